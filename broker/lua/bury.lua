#!lua flags=allow-oom
-- bury: running -> dead; an entry that the replica which has claimed it cannot read. Where `open` does not name it, it is
-- nobody's request: then it is only kept to be looked at. Twice is as once.
-- KEYS  1 lane  2 open  3 notes  4 result prefix  5 reply prefix  6 deadlines  7 holds  8 payload prefix  9 dead  10 status
-- ARGV  1 lane name  2 entry id  3 replica  4 cause  5 ttl_s
-- reply {ref, waiter, ...}
local open, notes, results, replies, ttl_s = KEYS[2], KEYS[3], KEYS[4], KEYS[5], ARGV[5]
local deadlines, holds, payloads, dead, status = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
--include ending
--include dead
--include burying
local lane, lane_name, entry = KEYS[1], ARGV[1], ARGV[2]
local found = redis.call('XRANGE', lane, entry, entry)[1]
redis.call('XACK', lane, 'replicas', entry)
if not found then return {} end
redis.call('XDEL', lane, entry)
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local request = read_request(found[2])
local last = { attempt = request.attempt, replica = ARGV[3], cause = ARGV[4], at_ms = now_ms }
bury(request, lane_name, entry, add_to_history(request, last))
publish()
bound_dead(now_ms)
return waiters
