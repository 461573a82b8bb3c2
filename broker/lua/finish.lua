#!lua flags=allow-oom
-- finish: running -> succeeded | failed. The fence: `open` must still name this very entry; release and finish change it.
-- KEYS  1 lane  2 open  3 notes  4 result prefix  5 reply prefix  6 deadlines  7 holds  8 payload prefix  9 value prefix
-- ARGV  1 lane name  2 ttl_s   then per request: entry id, ref, client, "succeeded" | "failed", envelope
--       (or "@<bytes>": the envelope lies under its value key)
-- reply {{position, "done" (this very attempt finished before) | "stale" (another attempt owns it) | "ended" (cancelled,
-- timed out, or its result was dropped) | "missing" (its value key), ...}, {ref, waiter, ...}}. Error BADREQUEST
-- Commands on many refs at once: a call from Lua costs several times what the command does.
local open, notes, results, replies, ttl_s = KEYS[2], KEYS[3], KEYS[4], KEYS[5], ARGV[2]
local deadlines, holds, payloads = KEYS[6], KEYS[7], KEYS[8]
--include ending
if (#ARGV - 2) % 5 ~= 0 or #ARGV > 25000 then
  return redis.error_reply('BADREQUEST five arguments per request, and less than 5000 requests')
end
local lane, prefix, refs, entries, refused = KEYS[1], ARGV[1] .. ' ', {}, {}, {}
for i = 3, #ARGV, 5 do refs[#refs + 1] = ARGV[i + 1] end

local function refuse(position, why)
  refused[#refused + 1] = position - 1
  refused[#refused + 1] = why
end

local function why_refused(position, place, now_at)
  if now_at then return 'stale' end
  local header = string.match(redis.call('GETRANGE', results .. refs[position], 0, 99), '^[^\n]*')
  -- Equal, not found in it: entry 1-1 is not 1-10, and what was buried bears its last entry without its value.
  if header == 'succeeded ' .. place or header == 'failed ' .. place then return 'done' end
  local state = string.match(header, '^%S*')
  return (state == '' or state == 'cancelled' or state == 'timed_out') and 'ended' or 'stale'
end

local function lacks_value(ref, entry, envelope)
  if string.byte(envelope) ~= 64 then return false end -- no '@'
  -- As long as its result may live.
  return redis.call('EXPIRE', KEYS[9] .. ref .. ':' .. entry, math.max(ttl_s, WAITED_FOR_S)) == 0
end

read_notes_of(refs)
for position, now_at in ipairs(redis.call('HMGET', open, unpack(refs))) do
  local i = position * 5 - 2
  local place = prefix .. ARGV[i]
  if now_at ~= place then
    refuse(position, why_refused(position, place, now_at))
    entries[#entries + 1] = ARGV[i] -- gone already, or some other program wrote it: then it must not stay for ever
  elseif lacks_value(refs[position], ARGV[i], ARGV[i + 4]) then
    refuse(position, 'missing')
  else
    entries[#entries + 1] = ARGV[i]
    conclude(refs[position], ARGV[i + 2], ARGV[i + 3] .. ' ' .. place, ARGV[i + 4])
  end
end
if #entries > 0 then
  redis.call('XACK', lane, 'replicas', unpack(entries))
  redis.call('XDEL', lane, unpack(entries))
end
publish()
return { refused, waiters }
