#!lua flags=allow-oom
-- close: take no more requests for a deployment, unless it was deployed anew. Its replicas see that, and drain.
-- KEYS  1 config  2 definition
-- ARGV  1 revision
-- reply 1 if it is closed (by now, or before), else 0
local revision = redis.call('HGET', KEYS[1], 'revision')
if revision and revision ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1], KEYS[2])
return 1
