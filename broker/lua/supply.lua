#!lua flags=allow-oom
-- supply: one value for a parked request; the last one takes it parked -> queued (or delayed). Once per ref and waiter.
-- KEYS  1 open  2 parked  3 due  4 held prefix  5 lane prefix
-- ARGV  1 ref  2 ref id of the value  3 the value as stored
-- reply "queued" | "delayed" | "parked" (others are missing) | "gone" (not parked any more, or supplied before)
local open, held_prefix, lane_prefix = KEYS[1], KEYS[4], KEYS[5]
local ref, held, field = ARGV[1], KEYS[4] .. ARGV[1], 'dep:' .. ARGV[2]
if redis.call('HGET', held, field) ~= '' then return 'gone' end
--include promoting
redis.call('HSET', held, field, ARGV[3])
if redis.call('HINCRBY', held, 'missing', -1) > 0 then return 'parked' end
redis.call('ZREM', KEYS[2], ref)
local due_ms, time = tonumber(redis.call('HGET', held, 'due_ms') or '0'), redis.call('TIME')
if due_ms > time[1] * 1000 + math.floor(time[2] / 1000) then
  redis.call('HSET', open, ref, 'delayed')
  redis.call('ZADD', KEYS[3], due_ms, ref)
  return 'delayed'
end
promote(ref)
return 'queued'
