#!lua
-- submit: unknown -> queued, for each request that is neither open nor ended. Twice is as once.
-- KEYS  1 config  2 open  3 result prefix  4 lane prefix  5 notes  6 deadlines  7 payload prefix
-- ARGV  1 client   then per request: ref, lane, method, extras ("" | "matched" | JSON, see extras.lua), envelope
-- reply {position, "open" | "done" | "full" (max_queued_requests) | "missing" (its payload), ...}: those that were not
-- taken in as new. Errors NODEPLOYMENT (no config), BADREQUEST (arguments that make no sense): nothing was written
-- Commands on many refs at once: a call from Lua costs several times what the command does.
local open, results, client = KEYS[2], KEYS[3], ARGV[1]
local config = redis.call('HMGET', KEYS[1], 'max_attempts', 'max_queued', 'timeout_ms')
if not config[1] then return redis.error_reply('NODEPLOYMENT this deployment does not exist') end
local notes, deadlines, payloads, default_timeout_ms = KEYS[5], KEYS[6], KEYS[7], tonumber(config[3] or nil)
--include extras
--include pending
if (#ARGV - 1) % 5 ~= 0 or #ARGV > MOST * 5 + 1 then
  return redis.error_reply('BADREQUEST five arguments per request, and 3900 requests at most')
end
local refs, result_keys, asked = {}, {}, {}
for i = 2, #ARGV, 5 do
  local extras = read_extras(ARGV[i + 3])
  if not LANES[ARGV[i + 1]] then return redis.error_reply('BADREQUEST there is no lane ' .. ARGV[i + 1]) end
  if not extras then return redis.error_reply('BADREQUEST extras ' .. string.sub(ARGV[i + 3], 1, 200)) end
  refs[#refs + 1] = ARGV[i]
  result_keys[#result_keys + 1] = results .. ARGV[i]
  asked[#asked + 1] = extras
end
local is_open = redis.call('HMGET', open, unpack(refs))
local has_ended = redis.call('EXISTS', unpack(result_keys)) > 0
local places, known, seen = {}, {}, {}

-- How many more may wait: what was returned does not count, and is never refused.
local room = math.huge
if config[2] then
  room = tonumber(config[2])
  for _, lane in ipairs({ 'high', 'normal', 'low' }) do
    room = room - redis.call('XLEN', KEYS[4] .. lane) + pending_in(KEYS[4] .. lane)
  end
end

local function answer(ref, position)
  if is_open[position] or seen[ref] then return 'open' end
  if has_ended and redis.call('EXISTS', results .. ref) == 1 then return 'done' end
  if room <= 0 then return 'full' end
end

for position, ref in ipairs(refs) do
  local i = position * 5 - 3
  local lane, method, extras, envelope, entry = ARGV[i + 1], ARGV[i + 2], asked[position], ARGV[i + 4], nil
  local refused = answer(ref, position)
  if refused == 'open' then
    keep_payload(ref, extras)
  elseif not refused then
    if extras == NOTHING and not default_timeout_ms then
      entry = redis.call('XADD', KEYS[4] .. lane, '*', 'ref', ref, 'method', method, 'reply', client, 'body', envelope)
    else
      local more = extra_fields(ref, extras)
      if more then
        entry = redis.call('XADD', KEYS[4] .. lane, '*',
          'ref', ref, 'method', method, 'reply', client, 'body', envelope, unpack(more))
      else
        refused = 'missing'
      end
    end
  end
  if refused then
    known[#known + 1] = position - 1
    known[#known + 1] = refused
  else
    room = room - 1
    seen[ref] = true
    places[#places + 1] = ref
    places[#places + 1] = lane .. ' ' .. entry
  end
end
if #places > 0 then redis.call('HSET', open, unpack(places)) end
return known
