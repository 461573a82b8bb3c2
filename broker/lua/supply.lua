#!lua flags=allow-oom
-- supply: values for parked requests; the last one takes a request parked -> queued (or delayed). Once per ref and waiter.
-- KEYS  1 open  2 parked  3 due  4 held  5 supplied prefix  6 lane prefix  7 holds
-- ARGV  per value: ref, ref id of the value, the value as stored, number of keys that must live until the request has
--       ended, those keys
-- reply per value "queued" | "delayed" | "parked" (others are missing) | "gone" (not parked any more, or supplied before)
local open, held, supplied_prefix, lane_prefix, holds = KEYS[1], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
--include promoting
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local unparked, delayed, answers, gone, refs, packed_of = {}, {}, {}, {}, {}, {}

local function keep(ref, first, count)
  if count == 0 then return end
  local before = redis.call('HGET', holds, ref) or string.format('%.0f', now_ms)
  redis.call('HSET', holds, ref, before .. ' ' .. table.concat(ARGV, ' ', first, first + count - 1))
end

local function delay(ref, due_ms)
  redis.call('HSET', open, ref, 'delayed')
  delayed[#delayed + 1] = due_ms
  delayed[#delayed + 1] = ref
  unparked[#unparked + 1] = ref
  return 'delayed'
end

-- It waits for this value only: the value need not be stored, unless its time has not come.
local function supply_only(ref, packed, field, stored, due_ms)
  if due_ms > 0 and redis.call('EXISTS', supplied_prefix .. ref) == 1 then return 'gone' end
  if due_ms > now_ms then
    redis.call('HSET', supplied_prefix .. ref, field, stored)
    return delay(ref, due_ms)
  end
  promote(ref, packed, field, stored)
  unparked[#unparked + 1] = ref
  gone[ref] = true
  return 'queued'
end

local function supply_one(ref, packed, field, stored, due_ms)
  local supplied = supplied_prefix .. ref
  local value, missing = unpack(redis.call('HMGET', supplied, field, 'missing'))
  if value ~= '' then return 'gone' end
  redis.call('HSET', supplied, field, stored, 'missing', missing - 1)
  if tonumber(missing) > 1 then return 'parked' end
  if due_ms > now_ms then return delay(ref, due_ms) end
  promote(ref, packed)
  unparked[#unparked + 1] = ref
  gone[ref] = true
  return 'queued'
end

local function supply(ref, id, stored)
  local packed = packed_of[ref]
  if not packed or gone[ref] then return 'gone' end
  local due_ms, waits = string.match(packed, '^%S+ (%d+) (%S+)\n')
  if waits == '*' then return supply_one(ref, packed, 'dep:' .. id, stored, tonumber(due_ms)) end
  return waits == id and supply_only(ref, packed, 'dep:' .. id, stored, tonumber(due_ms)) or 'gone'
end

local i = 1
while i <= #ARGV do
  refs[#refs + 1] = ARGV[i]
  i = i + 4 + tonumber(ARGV[i + 3])
end
for position, packed in ipairs(redis.call('HMGET', held, unpack(refs))) do packed_of[refs[position]] = packed end
i = 1
while i <= #ARGV do
  local count = tonumber(ARGV[i + 3])
  local answer = supply(ARGV[i], ARGV[i + 1], ARGV[i + 2])
  if answer ~= 'gone' then keep(ARGV[i], i + 4, count) end
  answers[#answers + 1] = answer
  i = i + 4 + count
end
if #unparked > 0 then redis.call('ZREM', KEYS[2], unpack(unparked)) end
if #delayed > 0 then redis.call('ZADD', KEYS[3], unpack(delayed)) end
settle_promoted()
return answers
