#!lua
-- hold: unknown -> parked (some arguments have no value yet) | delayed. Twice is as once.
-- KEYS  1 config  2 open  3 result  4 held  5 parked  6 due  7 notes  8 deadlines  9 payload prefix
-- ARGV  1 client  2 ref  3 lane  4 method  5 extras (as of submit)  6 envelope  7 delay_ms  8 due_ms, at the earliest
--       9 repair_after_ms   then ref ids it depends on
-- reply "new" | "open" | "done" | "missing" (its payload). Errors NODEPLOYMENT (no config), TOOMANYREFS
local open, held, ref = KEYS[2], KEYS[4], ARGV[2]
local config = redis.call('HMGET', KEYS[1], 'max_attempts', 'timeout_ms')
if not config[1] then return redis.error_reply('NODEPLOYMENT this deployment does not exist') end
if redis.call('HEXISTS', open, ref) == 1 then return 'open' end
if redis.call('EXISTS', KEYS[3]) == 1 then return 'done' end
-- All values end up in one entry, and a call from Lua takes 8000 arguments: two per value, and a few more.
if #ARGV - 9 > 3900 then return redis.error_reply('TOOMANYREFS a request can wait for 3900 refs at most') end
local notes, deadlines, payloads, default_timeout_ms = KEYS[7], KEYS[8], KEYS[9], tonumber(config[2] or nil)
--include extras
local more = extra_fields(ref, ARGV[5])
if not more then return 'missing' end
redis.call('HSET', held, 'ref', ref, 'method', ARGV[4], 'reply', ARGV[1], 'body', ARGV[6], 'lane', ARGV[3], unpack(more))
local due_ms = math.max(clock() + tonumber(ARGV[7]), tonumber(ARGV[8]))
if due_ms > clock() then redis.call('HSET', held, 'due_ms', string.format('%.0f', due_ms)) end
if #ARGV > 9 then
  redis.call('HSET', held, 'missing', #ARGV - 9)
  for i = 10, #ARGV do redis.call('HSET', held, 'dep:' .. ARGV[i], '') end
  redis.call('HSET', open, ref, 'parked')
  redis.call('ZADD', KEYS[5], clock() + ARGV[9], ref)
else
  redis.call('HSET', open, ref, 'delayed')
  redis.call('ZADD', KEYS[6], due_ms, ref)
end
return 'new'
