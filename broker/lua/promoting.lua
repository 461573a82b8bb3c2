-- promoting: parked or delayed -> queued. Included by the scripts that do it, not run by itself.
-- expects locals: open, held_prefix, lane_prefix
local function promote(ref)
  local held, fields = redis.call('HGETALL', held_prefix .. ref), {}
  local lane
  for i = 1, #held, 2 do
    if held[i] == 'lane' then
      lane = held[i + 1]
    elseif held[i] ~= 'missing' and held[i] ~= 'due_ms' then
      fields[#fields + 1] = held[i]
      fields[#fields + 1] = held[i + 1]
    end
  end
  local entry = redis.call('XADD', lane_prefix .. lane, '*', unpack(fields))
  redis.call('HSET', open, ref, lane .. ' ' .. entry)
  redis.call('DEL', held_prefix .. ref)
end
