#!lua flags=allow-oom
-- sweep: delayed -> queued where due; names parked requests to look after and replicas without a lease. Bounded, idempotent.
-- KEYS  1-4 lanes  5 replicas  6 due  7 parked  8 open  9 held prefix  10 lane prefix  11 lease prefix
-- ARGV  1 at most so many  2 repair_after_ms
-- reply {promoted, {{ref, ref id it misses, ...}, ...}, {replica without lease, ...}}
local open, held_prefix, lane_prefix = KEYS[8], KEYS[9], KEYS[10]
--include promoting
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local due = redis.call('ZRANGEBYSCORE', KEYS[6], '-inf', now_ms, 'LIMIT', 0, ARGV[1])
for _, ref in ipairs(due) do
  redis.call('ZREM', KEYS[6], ref)
  if redis.call('EXISTS', held_prefix .. ref) == 1 then promote(ref) end
end

local stuck = {}
for _, ref in ipairs(redis.call('ZRANGEBYSCORE', KEYS[7], '-inf', now_ms, 'LIMIT', 0, ARGV[1])) do
  local row = { ref }
  for _, field in ipairs(redis.call('HKEYS', held_prefix .. ref)) do
    if string.sub(field, 1, 4) == 'dep:' and redis.call('HSTRLEN', held_prefix .. ref, field) == 0 then
      row[#row + 1] = string.sub(field, 5)
    end
  end
  stuck[#stuck + 1] = row
  redis.call('ZADD', KEYS[7], now_ms + ARGV[2], ref)
end

local seen, without_lease = {}, {}
local function look_at(replica)
  if not seen[replica] then
    seen[replica] = true
    if redis.call('EXISTS', KEYS[11] .. replica) == 0 then without_lease[#without_lease + 1] = replica end
  end
end
for _, replica in ipairs(redis.call('HKEYS', KEYS[5])) do look_at(replica) end
for lane = 1, 4 do
  local consumers = redis.pcall('XINFO', 'CONSUMERS', KEYS[lane], 'replicas')
  if not consumers.err then
    for _, consumer in ipairs(consumers) do look_at(consumer[2]) end
  end
end
return { #due, stuck, without_lease }
