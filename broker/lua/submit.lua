#!lua
-- submit: unknown -> queued, for each request that is neither open nor ended. Twice is as once.
-- KEYS  1 config  2 open  3 result prefix  4 lane prefix  5 notes  6 deadlines  7 payload prefix
-- ARGV  1 client   then groups: lane, method, extras ("" | "matched" | JSON, see extras.lua), how many requests, and as
--       often: ref, envelope
-- reply {position, "open" | "done" | "full" (max_queued_requests) | "missing" (its payload), ...}: those that were not
-- taken in as new. Errors NODEPLOYMENT (no config), BADREQUEST (arguments that make no sense): nothing was written
-- Commands on many refs at once: a call from Lua costs several times what the command does.
local open, results, client = KEYS[2], KEYS[3], ARGV[1]
local config = redis.call('HMGET', KEYS[1], 'max_attempts', 'max_queued', 'timeout_ms')
if not config[1] then return redis.error_reply('NODEPLOYMENT this deployment does not exist') end
local notes, deadlines, payloads, default_timeout_ms = KEYS[5], KEYS[6], KEYS[7], tonumber(config[3] or nil)
--include extras
--include pending
local refs, result_keys, groups, i = {}, {}, {}, 2
while i <= #ARGV do
  local lane, method, given, count = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3] or nil)
  local last = i + 3 + 2 * (count or 0)
  if not (count and count >= 1 and count % 1 == 0 and last <= #ARGV and #refs + count <= MOST) then
    return redis.error_reply('BADREQUEST a group is lane, method, extras, a count, and so many refs and envelopes; 3900 at most')
  end
  local extras = read_extras(given)
  if not LANES[lane] then return redis.error_reply('BADREQUEST there is no lane ' .. lane) end
  if not extras then return redis.error_reply('BADREQUEST extras ' .. string.sub(given, 1, 200)) end
  groups[#groups + 1] = { lane = lane, method = method, extras = extras, first = #refs + 1, last = #refs + count, at = i + 4 }
  for j = i + 4, last, 2 do
    refs[#refs + 1] = ARGV[j]
    result_keys[#result_keys + 1] = results .. ARGV[j]
  end
  i = last + 1
end
if #refs == 0 then return {} end
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

-- One request: its place, or nil and why there is none.
local function take_in(ref, envelope, position, group, stream)
  local extras, refused = group.extras, answer(ref, position)
  if refused == 'open' then keep_payload(ref, extras) end
  if refused then return nil, refused end
  local more = extras ~= NOTHING or default_timeout_ms
  if not more then
    return redis.call('XADD', stream, '*', 'ref', ref, 'method', group.method, 'reply', client, 'body', envelope)
  end
  more = extra_fields(ref, extras)
  if not more then return nil, 'missing' end
  return redis.call('XADD', stream, '*',
    'ref', ref, 'method', group.method, 'reply', client, 'body', envelope, unpack(more))
end

for _, group in ipairs(groups) do
  local stream, prefix = KEYS[4] .. group.lane, group.lane .. ' '
  for position = group.first, group.last do
    local ref = refs[position]
    local entry, refused = take_in(ref, ARGV[group.at + 2 * (position - group.first) + 1], position, group, stream)
    if entry then
      room = room - 1
      seen[ref] = true
      places[#places + 1] = ref
      places[#places + 1] = prefix .. entry
    else
      known[#known + 1] = position - 1
      known[#known + 1] = refused
    end
  end
end
if #places > 0 then redis.call('HSET', open, unpack(places)) end
return known
