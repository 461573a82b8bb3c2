#!lua
-- submit: unknown -> queued, for each request that is neither open nor ended. Twice is as once.
-- KEYS  1 config  2 open  3 result prefix  4 lane prefix
-- ARGV  1 client   then per request: ref, lane, method, "matched" | "", envelope
-- reply {position, "open" | "done", ...}: the requests that were not new. No config: error NODEPLOYMENT
local open, results, client = KEYS[2], KEYS[3], ARGV[1]
if redis.call('EXISTS', KEYS[1]) == 0 then return redis.error_reply('NODEPLOYMENT') end
local known = {}
for i = 2, #ARGV, 5 do
  local ref, answer = ARGV[i], nil
  if redis.call('HEXISTS', open, ref) == 1 then
    answer = 'open'
  elseif redis.call('EXISTS', results .. ref) == 1 then
    answer = 'done'
  end
  if answer then
    known[#known + 1] = (i - 2) / 5
    known[#known + 1] = answer
  else
    local lane, entry = ARGV[i + 1], nil
    if ARGV[i + 3] == '' then
      entry = redis.call('XADD', KEYS[4] .. lane, '*',
        'ref', ref, 'method', ARGV[i + 2], 'reply', client, 'body', ARGV[i + 4])
    else
      entry = redis.call('XADD', KEYS[4] .. lane, '*',
        'ref', ref, 'method', ARGV[i + 2], 'reply', client, 'body', ARGV[i + 4], 'want', ARGV[i + 3])
    end
    redis.call('HSET', open, ref, lane .. ' ' .. entry)
  end
end
return known
