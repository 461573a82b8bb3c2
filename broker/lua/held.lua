-- held: how a request is kept that waits beside the lanes. Included by the scripts that touch such requests.
-- expects locals: held (hash of ref -> packed request), supplied_prefix
-- packed: "<lane> <due_ms, or 0> <waits>", newline, lengths, newline, method, client, further fields, envelope; `waits` is
-- "-" (for its time only), the id of the one ref it waits for, or "*": for those in the hash supplied:<ref>, which has
-- "dep:<ref id>" -> value, or "" where that is missing, and how many are ("missing").
-- One text for it: a call from Lua costs several times what the command does, and texts of many requests take one call.
local function pack_held(lane, due_ms, waits, method, client, more, envelope)
  local lengths, fields = { #method, #client }, { method, client }
  for _, field in ipairs(more) do
    field = tostring(field)
    lengths[#lengths + 1] = #field
    fields[#fields + 1] = field
  end
  fields[#fields + 1] = envelope
  return lane .. ' ' .. due_ms .. ' ' .. waits .. '\n' .. table.concat(lengths, ' ') .. '\n' .. table.concat(fields)
end

-- Lane, due_ms, waits, and the fields of its entry; nil if that is no held request.
local function unpack_held(ref, packed)
  local lane, due_ms, waits, lengths, at = string.match(packed, '^(%S+) (%d+) (%S+)\n([%d ]+)\n()')
  if not lane then return nil end
  local parts = {}
  for length in string.gmatch(lengths, '%d+') do
    parts[#parts + 1] = string.sub(packed, at, at + length - 1)
    at = at + length
  end
  local fields = { 'ref', ref, 'method', parts[1], 'reply', parts[2], 'body', string.sub(packed, at) }
  for i = 3, #parts do fields[i + 6] = parts[i] end
  return lane, tonumber(due_ms), waits, fields
end
