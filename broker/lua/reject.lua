#!lua flags=allow-oom
-- reject: parked -> failed, with the error of a request it depends on.
-- KEYS  1 parked  2 open  3 notes  4 result prefix  5 reply prefix  6 held  7 deadlines  8 holds  9 payload prefix
-- ARGV  1 ref  2 ttl_s  3 error envelope
-- reply {"failed" | "gone", {ref, waiter, ...}}
local open, notes, results, replies, ttl_s = KEYS[2], KEYS[3], KEYS[4], KEYS[5], ARGV[2]
local deadlines, holds, payloads = KEYS[7], KEYS[8], KEYS[9]
local ref = ARGV[1]
if redis.call('HGET', open, ref) ~= 'parked' then return { 'gone', {} } end
--include ending
local client = redis.call('HGET', KEYS[6], 'reply') or ''
redis.call('DEL', KEYS[6])
redis.call('ZREM', KEYS[1], ref)
conclude(ref, client, 'failed - -', ARGV[3])
publish()
return { 'failed', waiters }
