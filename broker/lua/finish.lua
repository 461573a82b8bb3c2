#!lua flags=allow-oom
-- finish: running -> succeeded | failed. The fence: `open` must still name this very entry; release and finish change it.
-- KEYS  1 lane  2 open  3 notes  4 result prefix  5 reply prefix  6 deadlines  7 holds  8 payload prefix  9 value prefix
-- ARGV  1 lane name  2 ttl_s   then groups: client, "succeeded" | "failed", how many requests, and as often: entry id, ref,
--       envelope (or "@<bytes>": it lies under its value key)
-- reply {{position, "done" (this very attempt finished before) | "stale" (another attempt owns it) | "ended" (cancelled,
-- timed out, or its result was dropped) | "missing" (its value key), ...}, {ref, waiter, ...}}. Error BADREQUEST
-- Commands on many refs at once: a call from Lua costs several times what the command does.
local open, notes, results, replies, ttl_s = KEYS[2], KEYS[3], KEYS[4], KEYS[5], ARGV[2]
local deadlines, holds, payloads = KEYS[6], KEYS[7], KEYS[8]
--include ending
local lane, prefix, refs, entries, refused = KEYS[1], ARGV[1] .. ' ', {}, {}, {}
local groups, i = {}, 3
while i <= #ARGV do
  local count = tonumber(ARGV[i + 2] or nil)
  local last = i + 2 + 3 * (count or 0)
  if not (count and count >= 1 and count % 1 == 0 and last <= #ARGV and #refs + count < 5000) then
    return redis.error_reply('BADREQUEST a group is client, state, a count, and so many entries, refs and envelopes; less than 5000')
  end
  groups[#groups + 1] = { client = ARGV[i], state = ARGV[i + 1], first = #refs + 1, last = #refs + count, at = i + 3 }
  for j = i + 4, last, 3 do refs[#refs + 1] = ARGV[j] end
  i = last + 1
end
if #refs == 0 then return { refused, waiters } end

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
local places = redis.call('HMGET', open, unpack(refs))
for _, group in ipairs(groups) do
  local client, header, j = group.client, group.state .. ' ' .. prefix, group.at
  for position = group.first, group.last do
    local entry, envelope = ARGV[j], ARGV[j + 2]
    local place = prefix .. entry
    if places[position] ~= place then
      refuse(position, why_refused(position, place, places[position]))
      entries[#entries + 1] = entry -- gone already, or some other program wrote it: then it must not stay for ever
    elseif lacks_value(refs[position], entry, envelope) then
      refuse(position, 'missing')
    else
      entries[#entries + 1] = entry
      conclude(refs[position], client, header .. entry, envelope)
    end
    j = j + 3
  end
end
if #entries > 0 then
  redis.call('XACK', lane, 'replicas', unpack(entries))
  redis.call('XDEL', lane, unpack(entries))
end
publish()
return { refused, waiters }
