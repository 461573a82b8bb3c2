#!lua flags=allow-oom
-- forestall: unknown -> cancelled, by its own caller, for a request that may still be on its way here: its submit will
-- then find that it has ended. Twice is as once.
-- KEYS  1 open  2 result
-- ARGV  1 ref  2 ttl_s  3 why, as the caller will read it
-- reply "forestalled" | "open" (it has come: cancel it) | "ended"
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return 'open' end
local is_new = redis.call('SET', KEYS[2], 'cancelled - -\n' .. ARGV[3], 'NX', 'EX', ARGV[2])
return is_new and 'forestalled' or 'ended'
