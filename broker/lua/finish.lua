#!lua flags=allow-oom
-- finish: running -> succeeded | failed. The fence: `open` must still name this very entry; release and finish change it.
-- KEYS  1 lane  2 open  3 notes  4 result prefix  5 reply prefix
-- ARGV  1 lane name  2 ttl_s   then per request: entry id, ref, client, "succeeded" | "failed", envelope
-- reply {{position, "done" (this very attempt finished before) | "stale" (another attempt owns it), ...}, {ref, waiter, ...}}
-- Commands on many refs at once: a call from Lua costs several times what the command does.
local open, notes, results, replies, ttl_s = KEYS[2], KEYS[3], KEYS[4], KEYS[5], ARGV[2]
--include ending
local lane, prefix, refs, entries, refused = KEYS[1], ARGV[1] .. ' ', {}, {}, {}
for i = 3, #ARGV, 5 do refs[#refs + 1] = ARGV[i + 1] end

local function refuse(position, place)
  local header = string.match(redis.call('GETRANGE', results .. refs[position], 0, 99), '^[^\n]*')
  refused[#refused + 1] = position - 1
  -- Equal, not found in it: entry 1-1 is not 1-10, and what was buried bears its last entry without its value.
  local is_own = header == 'succeeded ' .. place or header == 'failed ' .. place
  refused[#refused + 1] = is_own and 'done' or 'stale'
end

for position, now_at in ipairs(redis.call('HMGET', open, unpack(refs))) do
  local i = position * 5 - 2
  local place = prefix .. ARGV[i]
  if now_at == place then
    entries[#entries + 1] = ARGV[i]
    conclude(refs[position], ARGV[i + 2], ARGV[i + 3] .. ' ' .. place, ARGV[i + 4])
  else
    refuse(position, place)
  end
end
if #entries > 0 then
  redis.call('XACK', lane, 'replicas', unpack(entries))
  redis.call('XDEL', lane, unpack(entries))
end
publish()
return { refused, waiters }
