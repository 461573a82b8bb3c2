#!lua flags=allow-oom
-- enlist: write what somebody says of itself, or is told, into a list. Also on a full server: who makes room must come up.
-- KEYS  1 list (a hash)
-- ARGV  1 name  2 record  3 "new" (not if there is one) | ""
-- reply 1 if written, else 0
if ARGV[3] == 'new' then return redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2]) end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
