-- ending: what every way to a terminal state does. Included by the scripts that end requests, not run by itself.
-- expects locals: open, notes, results, replies (keys and prefixes), ttl_s
local INLINE_BYTES = 4096 -- larger results are announced, not sent: a stalled client is cut off at 32 MB
local ended, outbox, waiters = {}, {}, {}
local has_notes = redis.call('EXISTS', notes) == 1

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

local function read_notes(ref, stored)
  local noted = redis.call('HMGET', notes, ref .. ':readers', ref .. ':waiters')
  for reader in string.gmatch(noted[1] or '', '%S+') do tell(reader, ref, stored) end
  for waiter in string.gmatch(noted[2] or '', '%S+') do
    waiters[#waiters + 1] = ref
    waiters[#waiters + 1] = waiter
  end
  redis.call('HDEL', notes, ref .. ':readers', ref .. ':waiters')
end

-- Store the outcome of one request and note whom to tell.
local function conclude(ref, client, header, body)
  local stored = header .. '\n' .. body
  redis.call('SET', results .. ref, stored, 'EX', ttl_s)
  ended[#ended + 1] = ref
  if client ~= '' then tell(client, ref, stored) end
  if has_notes then read_notes(ref, stored) end
end

-- Forget what was concluded, and send each client one message: a RESP array of ref, stored, ref, stored, ...
local function publish()
  if #ended > 0 then redis.call('HDEL', open, unpack(ended)) end
  for client, box in pairs(outbox) do
    redis.call('SPUBLISH', replies .. client, '*' .. #box * 2 .. '\r\n' .. table.concat(box))
  end
end
