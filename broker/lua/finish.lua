#!lua flags=allow-oom
-- finish: running -> succeeded | failed. The fence: `open` must still name this very entry; release and finish change it.
-- KEYS  1 lane  2 open  3 notes  4 result prefix  5 reply prefix  6 deadlines  7 holds  8 payload prefix  9 value prefix
-- ARGV  1 lane name  2 ttl_s   then groups: client, "succeeded" | "failed", how many requests, so many entry ids, so many refs,
--       so many envelopes (or "@<bytes>": it lies under its value key)
-- reply {{position, "done" (this very attempt finished before) | "stale" (another attempt owns it) | "ended" (cancelled,
-- timed out, or its result was dropped) | "missing" (its value key), ...}, {ref, waiter, ...}}, or {} for nothing of either.
-- Error BADREQUEST
-- Commands on many refs at once: a call from Lua costs several times what the command does.
local open, notes, results, replies, ttl_s = KEYS[2], KEYS[3], KEYS[4], KEYS[5], ARGV[2]
local deadlines, holds, payloads = KEYS[6], KEYS[7], KEYS[8]

-- One outcome that is small (with its header less than INLINE_BYTES), where no request has anything beside its place: what
-- follows, written out. Its functions and tables cost almost as much as the commands, and who calls in a loop waits for them.
if #ARGV == 8 and ARGV[5] == '1' and #ARGV[8] < 4000 and string.byte(ARGV[8]) ~= 64
  and redis.call('EXISTS', notes, deadlines, holds) == 0 then
  local client, entry, ref = ARGV[3], ARGV[6], ARGV[7]
  local place = ARGV[1] .. ' ' .. entry
  if redis.call('HGET', open, ref) == place then
    local stored = ARGV[4] .. ' ' .. place .. '\n' .. ARGV[8]
    redis.call('SETEX', results .. ref, math.max(1, math.ceil(ttl_s)), stored)
    redis.call('XACK', KEYS[1], 'replicas', entry)
    redis.call('XDEL', KEYS[1], entry)
    redis.call('HDEL', open, ref)
    if client ~= '' then
      local message = '*2\r\n$' .. #ref .. '\r\n' .. ref .. '\r\n$' .. #stored .. '\r\n' .. stored .. '\r\n'
      redis.call('SPUBLISH', replies .. client, message)
    end
    return {}
  end
end

--include ending
--include removing
--include columns
local lane, prefix, refused, byte = KEYS[1], ARGV[1] .. ' ', {}, string.byte
local groups = read_groups(3, 2, 3, 4999)
if not groups then
  return redis.error_reply('BADREQUEST a group is client, state, a count, so many entries, refs and envelopes; less than 5000')
end
local entries, refs = column(groups, 1), column(groups, 2)
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

-- "@<bytes>": as long as its result may live.
local function lacks_value(ref, entry)
  return redis.call('EXPIRE', KEYS[9] .. ref .. ':' .. entry, math.max(ttl_s, WAITED_FOR_S)) == 0
end

read_notes_of(refs)
local places, staying = redis.call('HMGET', open, unpack(refs)), {}
for _, group in ipairs(groups) do
  local client, state, envelopes = group[1], group[2] .. ' ', group.at + 2 * group.count - group.first
  for position = group.first, group.last do
    local entry, envelope = entries[position], ARGV[envelopes + position]
    local place = prefix .. entry
    if places[position] ~= place then
      -- Its entry is gone already, or some other program wrote it: then it must not stay for ever.
      refuse(position, why_refused(position, place, places[position]))
    elseif byte(envelope) == 64 and lacks_value(refs[position], entry) then
      refuse(position, 'missing')
      staying[entry] = true
    else
      conclude(refs[position], client, state .. place .. '\n' .. envelope)
    end
  end
end
remove(lane, next(staying) and without(staying, entries) or entries)
publish()
return { refused, waiters }
