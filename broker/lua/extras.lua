-- extras: what a caller may ask of a request beyond the usual. Included by the scripts that take requests in.
-- expects locals: notes, deadlines, payloads, default_timeout_ms (nil without one)
local now_ms
local function clock()
  if not now_ms then
    local time = redis.call('TIME')
    now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
  end
  return now_ms
end

-- The fields to add to the request, or nil: its arguments should lie in a key of their own and do not.
-- `text`: "" | "matched" | JSON {want, timeout_ms, attempts, kill, stream, payload}
local function extra_fields(ref, text)
  if text == 'matched' then text = '{"want":"matched"}' end
  local extras, fields = text == '' and {} or cjson.decode(text), {}
  local function add(name, value)
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
  if extras.payload then
    if redis.call('PERSIST', payloads .. ref) == 0 and redis.call('EXISTS', payloads .. ref) == 0 then return nil end
    redis.call('HSET', notes, ref .. ':payload', 1)
    add('payload', extras.payload)
  end
  local timeout_ms = tonumber(extras.timeout_ms) or default_timeout_ms
  if timeout_ms then
    local deadline_ms = string.format('%.0f', clock() + timeout_ms)
    redis.call('ZADD', deadlines, deadline_ms, ref)
    add('deadline', deadline_ms)
  end
  if extras.want then add('want', extras.want) end
  if extras.attempts then add('max_attempts', extras.attempts) end
  if extras.kill then add('kill', 1) end
  if extras.stream then add('stream', extras.stream) end
  return fields
end
