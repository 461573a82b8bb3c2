#!lua flags=allow-oom
-- remove: what is left of a closed deployment goes, in one step: not what was deployed anew since, and nothing that waits
-- for an end. Twice is as once.
-- KEYS  1 config  2 open   then all that it owns
-- reply "removed" | "deployed" (anew) | "open" (requests: to be discarded first)
if redis.call('EXISTS', KEYS[1]) == 1 then return 'deployed' end
if redis.call('EXISTS', KEYS[2]) == 1 then return 'open' end
redis.call('UNLINK', unpack(KEYS))
return 'removed'
