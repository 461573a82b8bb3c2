-- burying: running -> dead, of one entry that has been taken from its lane. Included by the scripts that do it.
-- expects locals: dead, and what ending and dead expect
local MOST_FIELDS = 3950 -- Lua hands over 8000 arguments at most; what has more was not written by submit

-- The fields of an entry. Some other program may have written it: nothing here may raise.
local function read_request(fields)
  local request = {}
  for i = 1, math.min(#fields, 2 * MOST_FIELDS), 2 do request[fields[i]] = fields[i + 1] end
  local attempt = tonumber(request.attempt) or 1
  request.attempt = attempt >= 1 and attempt < 1e9 and attempt or 1 -- neither infinite nor no number: JSON has no such
  return request
end

-- How its attempts have ended, and this one; as JSON.
local function add_to_history(request, last)
  local is_json, history = pcall(cjson.decode, request.history or '[]')
  if not is_json or type(history) ~= 'table' then history = {} end
  history[#history + 1] = last
  local can_encode, text = pcall(cjson.encode, history) -- a table with holes, or one that is too deep
  return can_encode and text or cjson.encode({ last })
end

local function add_entry(stream, request, id)
  local arguments = { id }
  for name, value in pairs(request) do
    arguments[#arguments + 1] = name
    arguments[#arguments + 1] = value
  end
  return redis.call('XADD', stream, unpack(arguments))
end

-- Is this entry what `open` says of its ref? Anything else is not the request that somebody waits for.
local function is_open_at(request, place) return request.ref and redis.call('HGET', open, request.ref) == place end

local function bury(request, lane_name, entry, history)
  request.history, request.lane = history, request.lane or lane_name
  local place = lane_name .. ' ' .. entry
  add_entry(dead, request, '*')
  if not is_open_at(request, place) then return end
  conclude(request.ref, request.reply or '', 'dead ' .. place .. '\n' .. history, true)
  if request.payload then redis.call('EXPIRE', payloads .. request.ref, DEAD_KEPT_S) end
end
