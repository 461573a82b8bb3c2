#!lua flags=allow-oom
-- hand_back: running -> queued; entries that a living replica took and did not start. Not an attempt.
-- KEYS  1 lane it came from  2 lane it goes to  3 open
-- ARGV  1 name of the lane it goes to   then entry ids
-- reply how many were handed back
local count = 0
for i = 2, #ARGV do
  local entry = ARGV[i]
  local found = redis.call('XRANGE', KEYS[1], entry, entry)[1]
  if redis.call('XACK', KEYS[1], 'replicas', entry) == 1 and found then
    redis.call('XDEL', KEYS[1], entry)
    local again = redis.call('XADD', KEYS[2], '*', unpack(found[2]))
    for k = 1, #found[2], 2 do
      if found[2][k] == 'ref' then redis.call('HSET', KEYS[3], found[2][k + 1], ARGV[1] .. ' ' .. again) end
    end
    count = count + 1
  end
end
return count
