#!lua flags=allow-oom
-- retry: running -> delayed; its code raised, and it is to be tried again; or nothing of it has run, which is no attempt.
-- Fenced as finish is. Twice is as once.
-- KEYS  1 lane  2 open  3 held  4 due  5 supplied prefix
-- ARGV  1 lane name   then per request: entry id, ref, delay_ms, how this attempt ended (JSON, without attempt and at_ms;
--       "" where it did not begin)
-- reply {position, ...} of those that this attempt does not own any more
local lane, open, held, supplied_prefix = KEYS[1], KEYS[2], KEYS[3], KEYS[5]
--include held
if (#ARGV - 1) % 4 ~= 0 then return redis.error_reply('BADREQUEST four arguments per request') end
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local OWN = { ref = true, method = true, reply = true, body = true, lane = true, attempt = true, retries = true, history = true }

local function hold(ref, fields, due_ms, failure)
  local request, more = {}, {}
  for i = 1, #fields, 2 do
    request[fields[i]] = fields[i + 1]
    if not OWN[fields[i]] then
      more[#more + 1] = fields[i]
      more[#more + 1] = fields[i + 1]
    end
  end
  local counted = { attempt = request.attempt, retries = request.retries, history = request.history }
  if failure ~= '' then
    local ending, is_json, history = cjson.decode(failure), pcall(cjson.decode, request.history or '[]')
    if not is_json or type(history) ~= 'table' then history = {} end -- some other program wrote it
    local attempt = tonumber(request.attempt) or 1
    if not (attempt >= 1 and attempt < 1e9) then attempt = 1 end
    ending.attempt, ending.at_ms = attempt, now_ms
    history[#history + 1] = ending
    counted.attempt, counted.retries = attempt + 1, (tonumber(request.retries) or 0) + 1
    counted.history = cjson.encode(history)
  end
  for name, value in pairs(counted) do
    more[#more + 1] = name
    more[#more + 1] = value
  end
  local packed = pack_held(request.lane or ARGV[1], due_ms, '-', request.method, request.reply, more, request.body)
  redis.call('HSET', held, ref, packed)
  redis.call('HSET', open, ref, 'delayed')
  redis.call('ZADD', KEYS[4], due_ms, ref)
end

local refused = {}
for i = 2, #ARGV, 4 do
  local entry, ref = ARGV[i], ARGV[i + 1]
  local found = redis.call('HGET', open, ref) == ARGV[1] .. ' ' .. entry and redis.call('XRANGE', lane, entry, entry)[1]
  if found then
    hold(ref, found[2], string.format('%.0f', now_ms + tonumber(ARGV[i + 2])), ARGV[i + 3])
    redis.call('XACK', lane, 'replicas', entry)
    redis.call('XDEL', lane, entry)
  else
    refused[#refused + 1] = (i - 2) / 4
  end
end
return refused
