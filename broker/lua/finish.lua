#!lua flags=allow-oom
-- finish: running -> succeeded | failed. XACK = 1 is the fence: a late owner changes nothing.
-- KEYS  1 lane  2 open  3 notes  4 result prefix  5 reply prefix
-- ARGV  1 lane name  2 ttl_s   then per request: entry id, ref, client, "succeeded" | "failed", envelope
-- reply {{position, "done" (this very attempt finished before) | "stale" (another attempt owns it), ...}, {ref, waiter, ...}}
local open, notes, results, replies, ttl_s = KEYS[2], KEYS[3], KEYS[4], KEYS[5], ARGV[2]
--include ending
local lane, lane_name, refused = KEYS[1], ARGV[1], {}
for i = 3, #ARGV, 5 do
  local entry, ref = ARGV[i], ARGV[i + 1]
  local place = ' ' .. lane_name .. ' ' .. entry
  if redis.call('XACK', lane, 'replicas', entry) == 1 then
    redis.call('XDEL', lane, entry)
    conclude(ref, ARGV[i + 2], ARGV[i + 3] .. place, ARGV[i + 4])
  else
    local header = string.match(redis.call('GETRANGE', results .. ref, 0, 99), '^[^\n]*')
    refused[#refused + 1] = (i - 3) / 5
    refused[#refused + 1] = string.find(header, place, 1, true) and 'done' or 'stale'
  end
end
publish()
return { refused, waiters }
