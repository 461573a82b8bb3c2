#!lua
-- hold: unknown -> parked (some arguments have no value yet) | delayed. Twice is as once.
-- KEYS  1 config  2 open  3 result  4 held  5 parked  6 due  7 notes  8 deadlines  9 payload prefix
-- ARGV  1 client  2 ref  3 lane  4 method  5 extras (as of submit)  6 envelope  7 delay_ms  8 due_ms, at the earliest
--       9 repair_after_ms   then ref ids it depends on
-- reply "new" | "open" | "done" | "missing" (its payload). Errors NODEPLOYMENT (no config), TOOMANYREFS, BADREQUEST
-- (arguments that make no sense): nothing was written
local open, held, ref = KEYS[2], KEYS[4], ARGV[2]
local config = redis.call('HMGET', KEYS[1], 'max_attempts', 'timeout_ms')
if not config[1] then return redis.error_reply('NODEPLOYMENT this deployment does not exist') end
local notes, deadlines, payloads, default_timeout_ms = KEYS[7], KEYS[8], KEYS[9], tonumber(config[2] or nil)
--include extras
-- All values end up in one entry, two arguments per value and a few more.
if #ARGV - 9 > MOST then return redis.error_reply('TOOMANYREFS a request can wait for 3900 refs at most') end
local extras, delay_ms, at_ms, repair_ms = read_extras(ARGV[5]), finite(ARGV[7]), finite(ARGV[8]), finite(ARGV[9])
if not LANES[ARGV[3]] then return redis.error_reply('BADREQUEST there is no lane ' .. ARGV[3]) end
if not extras then return redis.error_reply('BADREQUEST extras ' .. string.sub(ARGV[5], 1, 200)) end
if not (delay_ms and at_ms and repair_ms) then return redis.error_reply('BADREQUEST times are numbers of ms') end
if redis.call('HEXISTS', open, ref) == 1 then
  keep_payload(ref, extras)
  return 'open'
end
if redis.call('EXISTS', KEYS[3]) == 1 then return 'done' end
local more = extra_fields(ref, extras)
if not more then return 'missing' end
redis.call('HSET', held, 'ref', ref, 'method', ARGV[4], 'reply', ARGV[1], 'body', ARGV[6], 'lane', ARGV[3], unpack(more))
local due_ms = math.max(clock() + delay_ms, at_ms)
if due_ms > clock() then redis.call('HSET', held, 'due_ms', string.format('%.0f', due_ms)) end
if #ARGV > 9 then
  local missing = 0 -- a ref that is named twice is one
  for i = 10, #ARGV do missing = missing + redis.call('HSET', held, 'dep:' .. ARGV[i], '') end
  redis.call('HSET', held, 'missing', missing)
  redis.call('HSET', open, ref, 'parked')
  redis.call('ZADD', KEYS[5], clock() + repair_ms, ref)
else
  redis.call('HSET', open, ref, 'delayed')
  redis.call('ZADD', KEYS[6], due_ms, ref)
end
return 'new'
