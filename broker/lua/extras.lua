-- extras: what a caller may ask of a request beyond the usual. Included by the scripts that take requests in.
-- expects locals: notes, deadlines, payloads, default_timeout_ms (nil without one)
-- Reading comes before the first write, and may refuse. After that nothing fails any more.
local LANES = { returned = true, high = true, normal = true, low = true }
local MOST = 3900 -- requests per call, refs per request: a call from Lua takes 8000 arguments, and each needs two
local MATCHED, NOTHING = { want = 'matched' }, {}
local now_ms
local function clock()
  if not now_ms then
    local time = redis.call('TIME')
    now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
  end
  return now_ms
end

-- Milliseconds or a count; nil for what is no number, or NaN, or beyond all reason (1e15 ms are 30,000 years).
local function finite(value)
  value = tonumber(value)
  return value and value > -1e15 and value < 1e15 and value or nil
end

-- `text`: "" | "matched" | JSON {want, timeout_ms, attempts, retry, kill, stream, payload}; nil for anything else.
local function read_extras(text)
  if text == '' then return NOTHING end
  if text == 'matched' then return MATCHED end
  local is_json, given = pcall(cjson.decode, text)
  if not is_json or type(given) ~= 'table' then return nil end
  local extras = {}
  for name, value in pairs(given) do
    if value == true then value = 1 end
    if type(value) == 'table' then return nil end
    if type(value) == 'string' or type(value) == 'number' then extras[name] = value end -- not null, not false
  end
  if extras.timeout_ms and not finite(extras.timeout_ms) then return nil end
  if extras.attempts and not (finite(extras.attempts) and finite(extras.attempts) >= 1) then return nil end
  return extras
end

-- The fields to add to the request, or nil: its arguments should lie in a key of their own and do not.
local function extra_fields(ref, extras)
  local fields = {}
  local function add(name, value)
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
  if extras.payload then
    if redis.call('PERSIST', payloads .. ref) == 0 and redis.call('EXISTS', payloads .. ref) == 0 then return nil end
    redis.call('HSET', notes, ref .. ':payload', 1)
    add('payload', extras.payload)
  end
  local timeout_ms = finite(extras.timeout_ms) or default_timeout_ms
  if timeout_ms then
    local deadline_ms = string.format('%.0f', clock() + timeout_ms)
    redis.call('ZADD', deadlines, deadline_ms, ref)
    add('deadline', deadline_ms)
  end
  if extras.want then add('want', extras.want) end
  if extras.attempts then add('max_attempts', extras.attempts) end
  if extras.retry then add('retry', extras.retry) end
  if extras.kill then add('kill', 1) end
  if extras.stream then add('stream', extras.stream) end
  return fields
end

-- Of a request that is open already: who sends again has written its arguments again, and that gave them a TTL.
local function keep_payload(ref, extras)
  if extras.payload and redis.call('HEXISTS', notes, ref .. ':payload') == 1 then
    redis.call('PERSIST', payloads .. ref)
  end
end
