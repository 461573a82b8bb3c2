#!lua flags=allow-oom
-- drop: forget dead letters, with their large arguments. Their results stay until their TTL. Twice is as once.
-- KEYS  1 dead  2 open  3 payload prefix
-- ARGV  entry ids in the stream of dead letters
-- reply how many were dropped
local count = 0
for _, entry in ipairs(ARGV) do
  local found = redis.call('XRANGE', KEYS[1], entry, entry)[1]
  if found then
    local letter = {}
    for i = 1, #found[2], 2 do letter[found[2][i]] = found[2][i + 1] end
    if letter.payload and letter.ref and redis.call('HEXISTS', KEYS[2], letter.ref) == 0 then
      redis.call('UNLINK', KEYS[3] .. letter.ref)
    end
    count = count + redis.call('XDEL', KEYS[1], entry)
  end
end
return count
