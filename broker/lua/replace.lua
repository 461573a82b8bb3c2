#!lua flags=allow-oom
-- replace: put an application's record in the place of the one that was read, if that is still there.
-- KEYS  1 apps
-- ARGV  1 application  2 what was read ("": nothing)  3 what to put there
-- reply 1 if done, 0 if another one is there
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
