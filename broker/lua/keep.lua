#!lua flags=allow-oom
-- keep: what others still need lives at least for another while. Never shortens a life. Twice is as once.
-- KEYS  a large value and whatever belongs to it
-- ARGV  1 ttl_ms
-- reply how many of them exist
local count = 0
for _, key in ipairs(KEYS) do
  local left_ms = redis.call('PTTL', key)
  if left_ms ~= -2 then count = count + 1 end
  if left_ms >= 0 and left_ms < tonumber(ARGV[1]) then redis.call('PEXPIRE', key, ARGV[1]) end
end
return count
