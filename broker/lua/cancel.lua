#!lua flags=allow-oom
-- cancel: parked | delayed | queued | running -> cancelled | timed_out (by its deadline, on the server's clock).
-- KEYS  1 open  2 notes  3 result prefix  4 reply prefix  5 lane prefix  6 held  7 parked  8 due  9 deadlines
--       10 holds  11 payload prefix  12 orders prefix  13 supplied prefix
-- ARGV  1 "cancelled" | "timed_out"  2 ttl_s  3 why, as the caller will read it   then refs
-- reply {per ref "ended" | "gone" (not open any more) | ms until its deadline (-1 without one), {ref, waiter, ...}}.
-- Error BADREQUEST
local open, notes, results, replies = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local lane_prefix, held, parked, due, supplied_prefix = KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[13]
local deadlines, holds, payloads, orders_prefix, ttl_s = KEYS[9], KEYS[10], KEYS[11], KEYS[12], ARGV[2]
if ARGV[1] ~= 'cancelled' and ARGV[1] ~= 'timed_out' then
  return redis.error_reply('BADREQUEST cancelled or timed_out, not ' .. ARGV[1])
end
--include ending
--include taking
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)

local function time_left_ms(ref)
  if ARGV[1] ~= 'timed_out' then return nil end
  local deadline_ms = redis.call('ZSCORE', deadlines, ref)
  if not deadline_ms then return -1 end
  local left_ms = tonumber(deadline_ms) - now_ms
  return left_ms > 0 and left_ms or nil
end

local answers = {}
for i = 4, #ARGV do
  local ref = ARGV[i]
  local place = redis.call('HGET', open, ref)
  local answer = not place and 'gone' or time_left_ms(ref)
  if not place then
    redis.call('ZREM', deadlines, ref)
  elseif not answer then
    local client, where = take(ref, place)
    conclude(ref, client, ARGV[1] .. ' ' .. where .. '\n' .. ARGV[3])
    answer = 'ended'
  end
  answers[#answers + 1] = answer
end
publish()
return { answers, waiters }
