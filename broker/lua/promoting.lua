-- promoting: parked or delayed -> queued. Included by the scripts that do it, not run by itself.
-- expects locals: open, held_prefix, lane_prefix
local promoted, left = {}, {} -- ref, place, ...; keys

-- Of a parked request the last value may come along: `field`, `value`.
local function promote(ref, field, value)
  local held, fields = redis.call('HGETALL', held_prefix .. ref), {}
  local lane
  for i = 1, #held, 2 do
    if held[i] == 'lane' then
      lane = held[i + 1]
    elseif held[i] ~= 'missing' and held[i] ~= 'due_ms' then
      fields[#fields + 1] = held[i]
      fields[#fields + 1] = held[i] == field and value or held[i + 1]
    end
  end
  local entry = redis.call('XADD', lane_prefix .. lane, '*', unpack(fields))
  promoted[#promoted + 1] = ref
  promoted[#promoted + 1] = lane .. ' ' .. entry
  left[#left + 1] = held_prefix .. ref
end

-- After the last one.
local function settle_promoted()
  if #left == 0 then return end
  redis.call('HSET', open, unpack(promoted))
  redis.call('DEL', unpack(left))
end
