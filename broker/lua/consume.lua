#!lua flags=allow-oom
-- consume: the reader of a stream has read its first items: they go, and the replica that runs it may go on. Twice is as once.
-- KEYS  1 open  2 items  3 lane prefix  4 orders prefix
-- ARGV  1 ref  2 how many have been read   then the keys of values of large ones among them
-- reply how many items were removed
local removed = redis.call('XTRIM', KEYS[2], 'MINID', string.format('%.0f-0', ARGV[2] + 1))
for i = 3, #ARGV do redis.call('UNLINK', ARGV[i]) end
local place = redis.call('HGET', KEYS[1], ARGV[1])
local lane, entry = string.match(place or '', '^(%S+) (%S+)$')
if lane then
  local pending = redis.pcall('XPENDING', KEYS[3] .. lane, 'replicas', entry, entry, 1)
  if not pending.err and pending[1] then
    redis.call('SPUBLISH', KEYS[4] .. pending[1][2], 'read ' .. place .. ' ' .. ARGV[2])
  end
end
return removed
