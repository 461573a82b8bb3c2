-- promoting: parked or delayed -> queued. Included by the scripts that do it, not run by itself.
-- expects locals: open, lane_prefix, and what held expects
--include held
local promoted, left = {}, {} -- ref, place, ...; refs

-- Of a parked request the last value may come along, as `field` and `value`. False if that is no held request.
local function promote(ref, packed, field, value)
  local lane, _, waits, fields = unpack_held(ref, packed)
  if not lane then return false end
  if field then
    fields[#fields + 1] = field
    fields[#fields + 1] = value
  elseif waits ~= '-' then
    local supplied = redis.call('HGETALL', supplied_prefix .. ref)
    for i = 1, #supplied, 2 do
      if supplied[i] ~= 'missing' then
        fields[#fields + 1] = supplied[i]
        fields[#fields + 1] = supplied[i + 1]
      end
    end
    redis.call('DEL', supplied_prefix .. ref)
  end
  local entry = redis.call('XADD', lane_prefix .. lane, '*', unpack(fields))
  promoted[#promoted + 1] = ref
  promoted[#promoted + 1] = lane .. ' ' .. entry
  left[#left + 1] = ref
  return true
end

-- After the last one.
local function settle_promoted()
  if #left == 0 then return end
  redis.call('HSET', open, unpack(promoted))
  redis.call('HDEL', held, unpack(left))
end
