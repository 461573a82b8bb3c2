#!lua
-- deploy: store what a deployment is to be. Its version stays where the code does: replicas then take the config over as
-- they run. Twice is as once.
-- KEYS  1 config  2 status  3 definition
-- ARGV  1 revision (a new one)  2 code ("" if unknown)  3 "configured" (there is a user_config) | ""
--       4 definition   then name, value, ... of what else is in the config
-- reply the version; replicas of another one are replaced
local version, revision, code, configured = unpack(redis.call('HMGET', KEYS[1], 'version', 'revision', 'code', 'configured'))
local cannot_start = revision and redis.call('HGET', KEYS[2], 'failed_revision') == revision
local must_forget = configured == 'configured' and ARGV[3] == '' -- an object cannot be told to have no user_config
if code ~= ARGV[2] or code == '' or cannot_start or must_forget then version = ARGV[1] end
redis.call('SET', KEYS[3], ARGV[4])
redis.call('HSET', KEYS[1], 'version', version, 'revision', ARGV[1], 'code', ARGV[2], 'configured', ARGV[3], unpack(ARGV, 5))
redis.call('HDEL', KEYS[2], 'state', 'message', 'traceback', 'failed_revision',
  'refused_revision', 'refused_message', 'refused_traceback', 'last_death')
-- Decided anew: this config may want replicas from the start.
if redis.call('HGET', KEYS[2], 'target') == '0' then redis.call('HDEL', KEYS[2], 'target') end
return version
