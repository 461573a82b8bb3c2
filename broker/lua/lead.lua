#!lua flags=allow-oom
-- lead: become or stay the one autoscaler that decides.
-- KEYS  1 leader  2 fence
-- ARGV  1 autoscaler  2 ttl_ms
-- reply the leader's fencing number | 0 (another one leads)
local leader = redis.call('GET', KEYS[1])
if leader then
  local name, fence = string.match(leader, '^(%S+) (%d+)$')
  if name ~= ARGV[1] then return 0 end
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return tonumber(fence)
end
local fence = redis.call('INCR', KEYS[2])
redis.call('SET', KEYS[1], ARGV[1] .. ' ' .. fence, 'PX', ARGV[2])
return fence
