#!lua
-- hold: unknown -> parked (some arguments have no value yet) | delayed. Twice is as once.
-- KEYS  1 config  2 open  3 result  4 held  5 parked  6 due
-- ARGV  1 client  2 ref  3 lane  4 method  5 envelope  6 delay_ms  7 repair_after_ms   then ref ids it depends on
-- reply "new" | "open" | "done". Errors NODEPLOYMENT (no config), TOOMANYREFS
local open, held, ref = KEYS[2], KEYS[4], ARGV[2]
if redis.call('EXISTS', KEYS[1]) == 0 then return redis.error_reply('NODEPLOYMENT this deployment does not exist') end
if redis.call('HEXISTS', open, ref) == 1 then return 'open' end
if redis.call('EXISTS', KEYS[3]) == 1 then return 'done' end
-- All values end up in one entry, and a call from Lua takes 8000 arguments: two per value, and a few more.
if #ARGV - 7 > 3900 then return redis.error_reply('TOOMANYREFS a request can wait for 3900 refs at most') end
local time = redis.call('TIME')
local now_ms, delay_ms = time[1] * 1000 + math.floor(time[2] / 1000), tonumber(ARGV[6])
redis.call('HSET', held, 'ref', ref, 'method', ARGV[4], 'reply', ARGV[1], 'body', ARGV[5], 'lane', ARGV[3])
if delay_ms > 0 then redis.call('HSET', held, 'due_ms', string.format('%.0f', now_ms + delay_ms)) end
if #ARGV > 7 then
  redis.call('HSET', held, 'missing', #ARGV - 7)
  for i = 8, #ARGV do redis.call('HSET', held, 'dep:' .. ARGV[i], '') end
  redis.call('HSET', open, ref, 'parked')
  redis.call('ZADD', KEYS[5], now_ms + ARGV[7], ref)
else
  redis.call('HSET', open, ref, 'delayed')
  redis.call('ZADD', KEYS[6], now_ms + delay_ms, ref)
end
return 'new'
