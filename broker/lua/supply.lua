#!lua flags=allow-oom
-- supply: values for parked requests; the last one takes a request parked -> queued (or delayed). Once per ref and waiter.
-- KEYS  1 open  2 parked  3 due  4 held prefix  5 lane prefix  6 holds
-- ARGV  per value: ref, ref id of the value, the value as stored, number of keys that must live until the request has
--       ended, those keys
-- reply per value "queued" | "delayed" | "parked" (others are missing) | "gone" (not parked any more, or supplied before)
local open, held_prefix, lane_prefix = KEYS[1], KEYS[4], KEYS[5]
--include promoting
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local unparked, delayed, answers, gone = {}, {}, {}, {}

local function keep(ref, first, count)
  if count == 0 then return end
  local before = redis.call('HGET', KEYS[6], ref) or string.format('%.0f', now_ms)
  redis.call('HSET', KEYS[6], ref, before .. ' ' .. table.concat(ARGV, ' ', first, first + count - 1))
end

local function supply(ref, field, stored)
  local held = held_prefix .. ref
  local value, missing, due_ms = unpack(redis.call('HMGET', held, field, 'missing', 'due_ms'))
  if value ~= '' or gone[ref] then return 'gone' end
  if tonumber(missing) > 1 then
    redis.call('HSET', held, field, stored, 'missing', missing - 1)
    return 'parked'
  end
  unparked[#unparked + 1] = ref
  if due_ms and tonumber(due_ms) > now_ms then
    redis.call('HSET', held, field, stored, 'missing', 0)
    redis.call('HSET', open, ref, 'delayed')
    delayed[#delayed + 1] = due_ms
    delayed[#delayed + 1] = ref
    return 'delayed'
  end
  promote(ref, field, stored)
  gone[ref] = true
  return 'queued'
end

local i = 1
while i <= #ARGV do
  local count = tonumber(ARGV[i + 3])
  local answer = supply(ARGV[i], 'dep:' .. ARGV[i + 1], ARGV[i + 2])
  if answer ~= 'gone' then keep(ARGV[i], i + 4, count) end
  answers[#answers + 1] = answer
  i = i + 4 + count
end
if #unparked > 0 then redis.call('ZREM', KEYS[2], unpack(unparked)) end
if #delayed > 0 then redis.call('ZADD', KEYS[3], unpack(delayed)) end
settle_promoted()
return answers
