#!lua
-- submit: unknown -> queued, for each request that is neither open nor ended. Twice is as once.
-- KEYS  1 config  2 open  3 result prefix  4 lane prefix
-- ARGV  1 client   then per request: ref, lane, method, "matched" | "", envelope
-- reply {position, "open" | "done", ...}: the requests that were not new. No config: error NODEPLOYMENT
-- Commands on many refs at once: a call from Lua costs several times what the command does.
local open, results, client = KEYS[2], KEYS[3], ARGV[1]
if redis.call('EXISTS', KEYS[1]) == 0 then return redis.error_reply('NODEPLOYMENT this deployment does not exist') end
local refs, result_keys = {}, {}
for i = 2, #ARGV, 5 do
  refs[#refs + 1] = ARGV[i]
  result_keys[#result_keys + 1] = results .. ARGV[i]
end
local is_open = redis.call('HMGET', open, unpack(refs))
local has_ended = redis.call('EXISTS', unpack(result_keys)) > 0
local places, known, seen = {}, {}, {}

local function answer(ref, position)
  if is_open[position] or seen[ref] then return 'open' end
  if has_ended and redis.call('EXISTS', results .. ref) == 1 then return 'done' end
end

for position, ref in ipairs(refs) do
  local before, i = answer(ref, position), position * 5 - 3
  if before then
    known[#known + 1] = position - 1
    known[#known + 1] = before
  else
    local lane, entry = ARGV[i + 1], nil
    if ARGV[i + 3] == '' then
      entry = redis.call('XADD', KEYS[4] .. lane, '*',
        'ref', ref, 'method', ARGV[i + 2], 'reply', client, 'body', ARGV[i + 4])
    else
      entry = redis.call('XADD', KEYS[4] .. lane, '*',
        'ref', ref, 'method', ARGV[i + 2], 'reply', client, 'body', ARGV[i + 4], 'want', ARGV[i + 3])
    end
    seen[ref] = true
    places[#places + 1] = ref
    places[#places + 1] = lane .. ' ' .. entry
  end
end
if #places > 0 then redis.call('HSET', open, unpack(places)) end
return known
