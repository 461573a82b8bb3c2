#!lua flags=allow-oom
-- withdraw: take back a config that a running replica could not take over, and put back the one that it works by.
-- KEYS  1 config  2 status
-- ARGV  1 revision  2 the one to go back to  3 its config, signed for that one  4 message  5 traceback  6-9 as of deploy
-- reply "withdrawn" | "superseded" (another one is in force) | "spent" (that one was withdrawn as well: no way back)
--include limits
if redis.call('HGET', KEYS[1], 'revision') ~= ARGV[1] then return 'superseded' end
if redis.call('HGET', KEYS[2], 'refused_revision') == ARGV[2] then return 'spent' end
redis.call('HSET', KEYS[1], 'revision', ARGV[2], 'config', ARGV[3])
set_limits(KEYS[1], ARGV[6], ARGV[7], ARGV[8], ARGV[9])
redis.call('HSET', KEYS[2], 'refused_revision', ARGV[1], 'refused_message', ARGV[4], 'refused_traceback', ARGV[5])
redis.call('HDEL', KEYS[2], 'state', 'message', 'traceback', 'failed_revision')
return 'withdrawn'
