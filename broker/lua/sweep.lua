#!lua flags=allow-oom
-- sweep: delayed -> queued where due; names parked requests to look after, replicas without a lease, requests past their
-- deadline, and large values to keep. Bounded, idempotent.
-- KEYS  1-4 lanes  5 replicas  6 due  7 parked  8 open  9 held  10 lane prefix  11 lease prefix  12 deadlines  13 holds
--       14 supplied prefix  15 dead  16 status
-- ARGV  1 at most so many  2 repair_after_ms  3 renew_holds_after_ms  4 cursor in the holds
-- reply {promoted, {{ref, ref id it misses, ...}, ...}, {replica without lease, ...}, {overdue ref, ...},
--        {next cursor, {key, ...}}, now_ms}
local open, held, supplied_prefix, lane_prefix, due, limit = KEYS[8], KEYS[9], KEYS[14], KEYS[10], KEYS[6], ARGV[1]
--include waking
local dead, status = KEYS[15], KEYS[16]
--include dead
bound_dead(now_ms)

local ENOUGH = 500 -- fields to look at: each costs 8 us here, and a round trip of the sweeper if its value is missing
local stuck, looked_at = {}, 0
for _, ref in ipairs(redis.call('ZRANGEBYSCORE', KEYS[7], '-inf', now_ms, 'LIMIT', 0, ARGV[1])) do
  if looked_at >= ENOUGH then break end
  local row, _, _, waits = { ref }, unpack_held(ref, redis.call('HGET', held, ref) or '')
  local fields = waits == '*' and redis.call('HKEYS', supplied_prefix .. ref) or {}
  for _, field in ipairs(fields) do
    if string.sub(field, 1, 4) == 'dep:' and redis.call('HSTRLEN', supplied_prefix .. ref, field) == 0 then
      row[#row + 1] = string.sub(field, 5)
    end
  end
  if waits and waits ~= '*' then row[#row + 1] = waits end
  looked_at = looked_at + 1 + #fields
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

local keep, next_cursor = {}, '0'
if redis.call('EXISTS', KEYS[13]) == 1 then
  local scanned = redis.call('HSCAN', KEYS[13], ARGV[4], 'COUNT', ARGV[1])
  next_cursor = scanned[1]
  for i = 1, #scanned[2], 2 do
    local ref, renewed_ms, keys = scanned[2][i], string.match(scanned[2][i + 1], '^(%d+) (.*)$')
    if redis.call('HEXISTS', open, ref) == 0 then
      redis.call('HDEL', KEYS[13], ref)
    elseif tonumber(renewed_ms) + ARGV[3] < now_ms then
      redis.call('HSET', KEYS[13], ref, string.format('%.0f ', now_ms) .. keys)
      for key in string.gmatch(keys, '%S+') do keep[#keep + 1] = key end
    end
  end
end
local overdue = redis.call('ZRANGEBYSCORE', KEYS[12], '-inf', now_ms, 'LIMIT', 0, ARGV[1])
return { #due_now, stuck, without_lease, overdue, { next_cursor, keep }, string.format('%.0f', now_ms) }
