#!lua flags=allow-oom
-- renew: these live, for another while. A SET with TTL, because PEXPIRE cannot revive what has expired.
-- KEYS  leases
-- ARGV  1 ttl_ms  2 who renews
for _, lease in ipairs(KEYS) do redis.call('SET', lease, ARGV[2], 'PX', ARGV[1]) end
return #KEYS
