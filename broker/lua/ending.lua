-- ending: what every way to a terminal state does. Included by the scripts that end requests, not run by itself.
-- expects locals: open, notes, results, replies, deadlines, holds, payloads (keys and prefixes), ttl_s
local INLINE_BYTES = 4096 -- larger results are announced, not sent: a stalled client is cut off at 32 MB
local WAITED_FOR_S = 60 -- a result that others wait for lives at least so long: a sweeper may have to supply it
local MOST = 1000 -- per call: Lua hands over 8000 arguments at most
local ended, ended_count, outbox, waiters, call = {}, 0, {}, {}, redis.call
ttl_s = math.max(1, math.ceil(tonumber(ttl_s))) -- raises here, before anything is written, if it is no number
local ttl_text = string.format('%d', ttl_s) -- once: making a text of a number costs as much as a small command
local has_more = redis.call('EXISTS', notes, deadlines, holds) > 0 -- of any request of this deployment

-- How RESP goes on to a text: the end of what was before, and the length.
local length_lines = {}
local function length_line(text)
  local line = length_lines[#text]
  if not line then
    line = '\r\n$' .. #text .. '\r\n'
    length_lines[#text] = line
  end
  return line
end

-- In parts, joined at the end: each string that Lua makes costs as much as a small command.
local function tell(client, ref, stored)
  local box = outbox[client]
  if not box then
    box = { parts = 0 }
    outbox[client] = box
  end
  if #stored > INLINE_BYTES then
    stored = string.sub(stored, 1, string.find(stored, '\n', 1, true))
  end
  local i = box.parts
  box[i + 1], box[i + 2], box[i + 3], box[i + 4] = length_line(ref), ref, length_line(stored), stored
  box.parts = i + 4
end

local notes_of, noted_fields = {}, {}

-- Read the notes of many refs at once; `conclude` reads those of one itself.
local function read_notes_of(refs)
  for first = 1, has_more and #refs or 0, MOST do
    local fields, count = {}, math.min(MOST, #refs - first + 1)
    for i = first, first + count - 1 do
      fields[#fields + 1] = refs[i] .. ':readers'
      fields[#fields + 1] = refs[i] .. ':waiters'
      fields[#fields + 1] = refs[i] .. ':payload'
    end
    local found = redis.call('HMGET', notes, unpack(fields))
    for i = 0, count - 1 do notes_of[refs[first + i]] = { found[3 * i + 1], found[3 * i + 2], found[3 * i + 3] } end
  end
end

-- Whom to tell, who waits, and what to delete; the time that the result must be kept.
local function use_notes(ref, stored, keeps_payload)
  if not notes_of[ref] then read_notes_of({ ref }) end
  local readers, waiting, payload = unpack(notes_of[ref], 1, 3)
  notes_of[ref] = {} -- once, also of a ref that is named twice
  if not (readers or waiting or payload) then return ttl_s end
  for reader in string.gmatch(readers or '', '%S+') do tell(reader, ref, stored) end
  for waiter in string.gmatch(waiting or '', '%S+') do
    waiters[#waiters + 1] = ref
    waiters[#waiters + 1] = waiter
  end
  if payload and not keeps_payload then redis.call('UNLINK', payloads .. ref) end
  for _, name in ipairs({ ':readers', ':waiters', ':payload' }) do noted_fields[#noted_fields + 1] = ref .. name end
  return waiting and math.max(ttl_s, WAITED_FOR_S) or ttl_s
end

-- Store the outcome of one request (a header, a newline, the rest) and note whom to tell.
local function conclude(ref, client, stored, keeps_payload)
  local keep_s = ttl_s
  if has_more then keep_s = use_notes(ref, stored, keeps_payload) end
  call('SETEX', results .. ref, keep_s == ttl_s and ttl_text or keep_s, stored)
  ended_count = ended_count + 1
  ended[ended_count] = ref
  if client ~= '' then tell(client, ref, stored) end
end

local function forget(command, key, members)
  for first = 1, #members, MOST do
    redis.call(command, key, unpack(members, first, math.min(first + MOST - 1, #members)))
  end
end

-- Forget what was concluded, and send each client one message: a RESP array of ref, stored, ref, stored, ...
local function publish()
  forget('HDEL', open, ended)
  if has_more then
    forget('HDEL', notes, noted_fields)
    forget('ZREM', deadlines, ended)
    forget('HDEL', holds, ended)
  end
  for client, box in pairs(outbox) do
    redis.call('SPUBLISH', replies .. client, '*' .. box.parts / 2 .. table.concat(box) .. '\r\n')
  end
end
