#!lua
-- deploy: store what a deployment is to be. Its version stays where the code does: replicas then take the config over as
-- they run. Twice is as once.
-- KEYS  1 config  2 status  3 definition
-- ARGV  1 revision (a new one)  2 code ("" if unknown)  3 "configured" (there is a user_config) | ""
--       4 config, signed for a new version  5 definition  6-9 max_attempts, result_ttl_s, max_queued, timeout_ms (see
--       limits.lua)  10 the version that may stay  11 config, signed for that one
-- reply the version; replicas of another one are replaced
--include limits
local version, revision, code, configured = unpack(redis.call('HMGET', KEYS[1], 'version', 'revision', 'code', 'configured'))
local cannot_start = revision and redis.call('HGET', KEYS[2], 'failed_revision') == revision
local must_forget = configured == 'configured' and ARGV[3] == '' -- an object cannot be told to have no user_config
local is_another = version ~= ARGV[10] and version ~= ARGV[1] -- came meanwhile, or cannot be read
if code ~= ARGV[2] or code == '' or cannot_start or must_forget or is_another then version = ARGV[1] end
local config = version == ARGV[1] and ARGV[4] or ARGV[11]
redis.call('SET', KEYS[3], ARGV[5])
redis.call('HSET', KEYS[1], 'version', version, 'revision', ARGV[1], 'code', ARGV[2], 'configured', ARGV[3],
  'config', config)
set_limits(KEYS[1], ARGV[6], ARGV[7], ARGV[8], ARGV[9])
redis.call('HDEL', KEYS[2], 'state', 'message', 'traceback', 'failed_revision',
  'refused_revision', 'refused_message', 'refused_traceback', 'last_death')
-- Decided anew: this config may want replicas from the start.
if redis.call('HGET', KEYS[2], 'target') == '0' then redis.call('HDEL', KEYS[2], 'target') end
return version
