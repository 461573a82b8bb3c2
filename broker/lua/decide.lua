#!lua flags=allow-oom
-- decide: a new target for one deployment, on record. Refused when a later leader has decided here before. Twice is as once.
-- KEYS  1 status  2 scaling  3 config
-- ARGV  1 fence  2 target  3 reason   then the record's fields: name, value, ...
-- reply "decided" | "fenced" | "gone" (the deployment was deleted)
if redis.call('EXISTS', KEYS[3]) == 0 then return 'gone' end
local fence, target, reason = unpack(redis.call('HMGET', KEYS[1], 'fence', 'target', 'reason'))
if tonumber(fence or '0') > tonumber(ARGV[1]) then return 'fenced' end
if fence == ARGV[1] and target == ARGV[2] and reason == ARGV[3] then return 'decided' end -- its reply was lost
redis.call('HSET', KEYS[1], 'fence', ARGV[1], 'target', ARGV[2], 'reason', ARGV[3])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', 1000, '*', 'target', ARGV[2], 'reason', ARGV[3], unpack(ARGV, 4))
return 'decided'
