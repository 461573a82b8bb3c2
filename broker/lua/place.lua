#!lua flags=no-writes
-- place: the state of one request, in a word (see states.py).
-- KEYS  1 open  2 result  3 lane prefix
-- ARGV  1 ref
-- reply the state | "unknown"
local place = redis.call('HGET', KEYS[1], ARGV[1])
if not place then
  local header = redis.call('GETRANGE', KEYS[2], 0, 20)
  return string.match(header, '^[a-z_]+') or 'unknown'
end
local lane, entry = string.match(place, '^(%S+) (%S+)$')
if not lane then return place end
local pending = redis.pcall('XPENDING', KEYS[3] .. lane, 'replicas', entry, entry, 1)
return not pending.err and pending[1] and 'running' or 'queued'
