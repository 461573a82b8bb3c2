-- ending: what every way to a terminal state does. Included by the scripts that end requests, not run by itself.
-- expects locals: open, notes, results, replies, deadlines, holds, payloads (keys and prefixes), ttl_s
local INLINE_BYTES = 4096 -- larger results are announced, not sent: a stalled client is cut off at 32 MB
local WAITED_FOR_S = 60 -- a result that others wait for lives at least so long: a sweeper may have to supply it
local MOST = 1000 -- per call: Lua hands over 8000 arguments at most
local ended, outbox, waiters = {}, {}, {}
ttl_s = math.max(1, math.ceil(tonumber(ttl_s))) -- raises here, before anything is written, if it is no number
local has_more = redis.call('EXISTS', notes, deadlines, holds) > 0 -- of any request of this deployment

local function tell(client, ref, stored)
  local box = outbox[client]
  if not box then
    box = {}
    outbox[client] = box
  end
  if #stored > INLINE_BYTES then
    stored = string.sub(stored, 1, string.find(stored, '\n', 1, true))
  end
  box[#box + 1] = '$' .. #ref .. '\r\n' .. ref .. '\r\n$' .. #stored .. '\r\n' .. stored .. '\r\n'
end

-- Whom to tell, who waits, and what to delete; the time that the result must be kept.
local function read_notes(ref, stored, keeps_payload)
  local noted = redis.call('HMGET', notes, ref .. ':readers', ref .. ':waiters', ref .. ':payload')
  local keep_s = ttl_s
  for reader in string.gmatch(noted[1] or '', '%S+') do tell(reader, ref, stored) end
  for waiter in string.gmatch(noted[2] or '', '%S+') do
    waiters[#waiters + 1] = ref
    waiters[#waiters + 1] = waiter
    keep_s = math.max(ttl_s, WAITED_FOR_S)
  end
  if noted[3] and not keeps_payload then redis.call('UNLINK', payloads .. ref) end
  redis.call('HDEL', notes, ref .. ':readers', ref .. ':waiters', ref .. ':payload')
  return keep_s
end

-- Store the outcome of one request and note whom to tell; for how long it is kept.
local function conclude(ref, client, header, body, keeps_payload)
  local stored, keep_s = header .. '\n' .. body, ttl_s
  if has_more then keep_s = read_notes(ref, stored, keeps_payload) end
  redis.call('SET', results .. ref, stored, 'EX', keep_s)
  ended[#ended + 1] = ref
  if client ~= '' then tell(client, ref, stored) end
  return keep_s
end

local function forget(command, key)
  for first = 1, #ended, MOST do
    redis.call(command, key, unpack(ended, first, math.min(first + MOST - 1, #ended)))
  end
end

-- Forget what was concluded, and send each client one message: a RESP array of ref, stored, ref, stored, ...
local function publish()
  forget('HDEL', open)
  if has_more then
    forget('ZREM', deadlines)
    forget('HDEL', holds)
  end
  for client, box in pairs(outbox) do
    redis.call('SPUBLISH', replies .. client, '*' .. #box * 2 .. '\r\n' .. table.concat(box))
  end
end
