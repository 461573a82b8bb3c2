#!lua flags=allow-oom
-- reject: parked -> failed, with the error of a request it depends on.
-- KEYS  1 parked  2 open  3 notes  4 result prefix  5 reply prefix  6 held  7 supplied prefix
--       8 deadlines  9 holds  10 payload prefix
-- ARGV  1 ref  2 ttl_s  3 error envelope
-- reply {"failed" | "gone", {ref, waiter, ...}}
local open, notes, results, replies, ttl_s = KEYS[2], KEYS[3], KEYS[4], KEYS[5], ARGV[2]
local deadlines, holds, payloads = KEYS[8], KEYS[9], KEYS[10]
local ref, held, supplied_prefix = ARGV[1], KEYS[6], KEYS[7]
if redis.call('HGET', open, ref) ~= 'parked' then return { 'gone', {} } end
--include ending
--include held
local _, _, _, fields = unpack_held(ref, redis.call('HGET', held, ref) or '')
redis.call('HDEL', held, ref)
redis.call('DEL', supplied_prefix .. ref)
redis.call('ZREM', KEYS[1], ref)
conclude(ref, fields and fields[6] or '', 'failed - -\n' .. ARGV[3])
publish()
return { 'failed', waiters }
