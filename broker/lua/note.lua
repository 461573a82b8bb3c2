#!lua flags=allow-oom
-- note: write fields of a deployment's status, unless it was deleted, or deployed anew since a revision.
-- KEYS  1 config  2 status
-- ARGV  1 revision ("": any)   then name, value, ...
-- reply 1 if written, else 0
local revision = redis.call('HGET', KEYS[1], 'revision')
if not revision or (ARGV[1] ~= '' and ARGV[1] ~= revision) then return 0 end
redis.call('HSET', KEYS[2], unpack(ARGV, 2))
return 1
