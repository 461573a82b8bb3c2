#!lua
-- submit: unknown -> queued, for each request that is neither open nor ended. Twice is as once.
-- KEYS  1 config  2 open  3 result prefix  4 lane prefix  5 notes  6 deadlines  7 payload prefix
-- ARGV  1 client   then groups: lane, method, extras ("" | "matched" | JSON, see extras.lua), how many requests, so many refs,
--       so many envelopes
-- reply {position, "open" | "done" | "full" (max_queued_requests) | "missing" (its payload), ...}: those that were not
-- taken in as new. Errors NODEPLOYMENT (no config), BADREQUEST (arguments that make no sense): nothing was written
-- Commands on many refs at once: a call from Lua costs several times what the command does.
local open, results, client, call = KEYS[2], KEYS[3], ARGV[1], redis.call
local config = call('HMGET', KEYS[1], 'max_attempts', 'max_queued', 'timeout_ms')
if not config[1] then return redis.error_reply('NODEPLOYMENT this deployment does not exist') end

-- One request without anything special, which is new: what follows, written out, as in finish.
if #ARGV == 7 and ARGV[5] == '1' and ARGV[2] == 'normal' and ARGV[4] == '' and not config[2] and not config[3] then
  local ref = ARGV[6]
  if call('HEXISTS', open, ref) == 0 and call('EXISTS', results .. ref) == 0 then
    local entry = call('XADD', KEYS[4] .. 'normal', '*', 'ref', ref, 'method', ARGV[3], 'reply', client, 'body', ARGV[7])
    call('HSET', open, ref, 'normal ' .. entry)
    return {}
  end
end

local notes, deadlines, payloads, default_timeout_ms = KEYS[5], KEYS[6], KEYS[7], tonumber(config[3] or nil)
--include extras
--include pending
--include columns
local groups = read_groups(2, 3, 2, MOST)
if not groups then
  return redis.error_reply('BADREQUEST a group is lane, method, extras, a count, so many refs, so many envelopes; 3900 requests at most')
end
for _, group in ipairs(groups) do
  local lane, extras = group[1], group[3]
  group.extras = read_extras(extras)
  if not LANES[lane] then return redis.error_reply('BADREQUEST there is no lane ' .. lane) end
  if not group.extras then return redis.error_reply('BADREQUEST extras ' .. string.sub(extras, 1, 200)) end
end
local refs = column(groups, 1)
if #refs == 0 then return {} end
local result_keys = column(groups, 1)
for position, ref in ipairs(refs) do result_keys[position] = results .. ref end
local is_open = call('HMGET', open, unpack(refs))
local has_ended = call('EXISTS', unpack(result_keys)) > 0

-- How many more may wait: what was returned does not count, and is never refused.
local room = math.huge
if config[2] then
  room = tonumber(config[2])
  for _, lane in ipairs({ 'high', 'normal', 'low' }) do
    room = room - call('XLEN', KEYS[4] .. lane) + pending_in(KEYS[4] .. lane)
  end
end

local known, seen, places, fields = {}, {}, {}, 0
for _, group in ipairs(groups) do
  local stream, prefix, method, extras = KEYS[4] .. group[1], group[1] .. ' ', group[2], group.extras
  local is_plain, envelopes = extras == NOTHING and not default_timeout_ms, group.at + group.count - group.first
  for position = group.first, group.last do
    local ref, envelope, entry, refused = refs[position], ARGV[envelopes + position]
    if is_open[position] or seen[ref] then
      refused = 'open'
      keep_payload(ref, extras)
    elseif has_ended and call('EXISTS', result_keys[position]) == 1 then
      refused = 'done'
    elseif room <= 0 then
      refused = 'full'
    elseif is_plain then
      entry = call('XADD', stream, '*', 'ref', ref, 'method', method, 'reply', client, 'body', envelope)
    else
      local more = extra_fields(ref, extras)
      refused = not more and 'missing'
      entry = more and call('XADD', stream, '*',
        'ref', ref, 'method', method, 'reply', client, 'body', envelope, unpack(more))
    end
    if entry then
      room = room - 1
      seen[ref] = true
      places[fields + 1], places[fields + 2] = ref, prefix .. entry
      fields = fields + 2
    else
      known[#known + 1] = position - 1
      known[#known + 1] = refused
    end
  end
end
if fields > 0 then call('HSET', open, unpack(places)) end
return known
