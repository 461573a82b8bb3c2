#!lua
-- hold: unknown -> parked (some arguments have no value yet) | delayed, for each request. Twice is as once.
-- KEYS  1 config  2 open  3 result prefix  4 held  5 parked  6 due  7 notes  8 deadlines  9 payload prefix
--       10 supplied prefix
-- ARGV  1 client  2 repair_after_ms   then per request: ref, lane, method, extras (as of submit), envelope, delay_ms,
--       due_ms (at the earliest), number of refs it depends on, their ids
-- reply per request "new" | "open" | "done" | "missing" (its payload). Errors NODEPLOYMENT (no config), TOOMANYREFS,
-- BADREQUEST (arguments that make no sense): nothing was written
local open, held, supplied_prefix, client, repair_ms = KEYS[2], KEYS[4], KEYS[10], ARGV[1], nil
local config = redis.call('HMGET', KEYS[1], 'max_attempts', 'timeout_ms')
if not config[1] then return redis.error_reply('NODEPLOYMENT this deployment does not exist') end
local notes, deadlines, payloads, default_timeout_ms = KEYS[7], KEYS[8], KEYS[9], tonumber(config[2] or nil)
--include extras
--include held
repair_ms = finite(ARGV[2])
local requests, refs, result_keys, i = {}, {}, {}, 3
while i <= #ARGV do
  local count = finite(ARGV[i + 7])
  local request = {
    ref = ARGV[i], lane = ARGV[i + 1], method = ARGV[i + 2], extras = read_extras(ARGV[i + 3] or '-'),
    envelope = ARGV[i + 4], delay_ms = finite(ARGV[i + 5]), due_ms = finite(ARGV[i + 6]), first = i + 8, count = count,
  }
  if not LANES[request.lane] then return redis.error_reply('BADREQUEST there is no lane ' .. tostring(request.lane)) end
  if not request.extras then return redis.error_reply('BADREQUEST extras ' .. string.sub(ARGV[i + 3] or '', 1, 200)) end
  if not (request.delay_ms and request.due_ms and repair_ms and count and count >= 0 and i + 7 + count <= #ARGV) then
    return redis.error_reply('BADREQUEST times are numbers of ms, and as many refs follow as is said')
  end
  -- All values end up in one entry, two arguments per value and a few more.
  if count > MOST then return redis.error_reply('TOOMANYREFS a request can wait for 3900 refs at most') end
  for k = i + 8, i + 7 + count do
    if not string.find(ARGV[k], '^%S+~%S+$') then
      return redis.error_reply('BADREQUEST no ref id: ' .. string.sub(ARGV[k], 1, 200))
    end
  end
  requests[#requests + 1] = request
  refs[#refs + 1] = request.ref
  result_keys[#result_keys + 1] = KEYS[3] .. request.ref
  i = i + 8 + count
end
if #requests > MOST then return redis.error_reply('BADREQUEST 3900 requests at most') end

local is_open = redis.call('HMGET', open, unpack(refs))
local has_ended = redis.call('EXISTS', unpack(result_keys)) > 0
local places, packed, parked, due, seen = {}, {}, {}, {}, {}

-- What it waits for, as it is packed. A ref that is named twice is one.
local function note_missing(request)
  if request.count == 0 then return '-' end
  local first = ARGV[request.first]
  if request.count == 1 then return first end
  local fields, missing, named = {}, 0, {}
  for k = request.first, request.first + request.count - 1 do
    if not named[ARGV[k]] then
      named[ARGV[k]] = true
      missing = missing + 1
      fields[#fields + 1] = 'dep:' .. ARGV[k]
      fields[#fields + 1] = ''
    end
  end
  if missing == 1 then return first end
  redis.call('HSET', supplied_prefix .. request.ref, 'missing', missing, unpack(fields))
  return '*'
end

local function hold(request, more)
  local ref, waits, due_ms = request.ref, note_missing(request), 0
  if request.delay_ms > 0 or request.due_ms > 0 then due_ms = math.max(clock() + request.delay_ms, request.due_ms) end
  local is_later = due_ms > clock()
  packed[#packed + 1] = ref
  packed[#packed + 1] = pack_held(
    request.lane, is_later and string.format('%.0f', due_ms) or '0', waits, request.method, client, more, request.envelope)
  places[#places + 1] = ref
  if waits == '-' then
    places[#places + 1] = 'delayed'
    due[#due + 1] = string.format('%.0f', math.max(due_ms, clock()))
    due[#due + 1] = ref
  else
    places[#places + 1] = 'parked'
    parked[#parked + 1] = string.format('%.0f', clock() + repair_ms)
    parked[#parked + 1] = ref
  end
end

local answers = {}
for position, request in ipairs(requests) do
  local answer = 'new'
  if is_open[position] or seen[request.ref] then
    keep_payload(request.ref, request.extras)
    answer = 'open'
  elseif has_ended and redis.call('EXISTS', KEYS[3] .. request.ref) == 1 then
    answer = 'done'
  else
    local more = extra_fields(request.ref, request.extras)
    if more then
      hold(request, more)
      seen[request.ref] = true
    else
      answer = 'missing'
    end
  end
  answers[position] = answer
end
if #places > 0 then
  redis.call('HSET', held, unpack(packed))
  redis.call('HSET', open, unpack(places))
end
if #parked > 0 then redis.call('ZADD', KEYS[5], unpack(parked)) end
if #due > 0 then redis.call('ZADD', KEYS[6], unpack(due)) end
return answers
