#!lua flags=allow-oom
-- supply: one value for a parked request; the last one takes it parked -> queued (or delayed). Once per ref and waiter.
-- KEYS  1 open  2 parked  3 due  4 held prefix  5 lane prefix  6 holds
-- ARGV  1 ref  2 ref id of the value  3 the value as stored   then keys that must live until the request has ended
-- reply "queued" | "delayed" | "parked" (others are missing) | "gone" (not parked any more, or supplied before)
local open, held_prefix, lane_prefix = KEYS[1], KEYS[4], KEYS[5]
local ref, held, field = ARGV[1], KEYS[4] .. ARGV[1], 'dep:' .. ARGV[2]
if redis.call('HGET', held, field) ~= '' then return 'gone' end
--include promoting
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', held, field, ARGV[3])
if #ARGV > 3 then
  local before = redis.call('HGET', KEYS[6], ref) or string.format('%.0f', now_ms)
  redis.call('HSET', KEYS[6], ref, before .. ' ' .. table.concat(ARGV, ' ', 4))
end
if redis.call('HINCRBY', held, 'missing', -1) > 0 then return 'parked' end
redis.call('ZREM', KEYS[2], ref)
local due_ms = tonumber(redis.call('HGET', held, 'due_ms') or '0')
if due_ms > now_ms then
  redis.call('HSET', open, ref, 'delayed')
  redis.call('ZADD', KEYS[3], due_ms, ref)
  return 'delayed'
end
promote(ref)
return 'queued'
