-- taking: take an open request away from where it is. Included by the scripts that end requests from outside.
-- expects locals: lane_prefix, parked, due, orders_prefix, and what held expects
--include held

-- From a lane, and from the replica that runs it, which is told. Its client, or nil: it runs and shall be `spared`.
local function take_from_lane(lane_name, entry, spared)
  local lane = lane_prefix .. lane_name
  local pending = redis.pcall('XPENDING', lane, 'replicas', entry, entry, 1)
  local holder = not pending.err and pending[1] and pending[1][2]
  if holder and spared then return nil end
  local found, request = redis.call('XRANGE', lane, entry, entry)[1], {}
  for i = 1, found and #found[2] or 0, 2 do request[found[2][i]] = found[2][i + 1] end
  redis.call('XACK', lane, 'replicas', entry)
  redis.call('XDEL', lane, entry)
  if holder then
    redis.call('SPUBLISH', orders_prefix .. holder, (request.kill and 'kill ' or 'cancel ') .. lane_name .. ' ' .. entry)
  end
  return request.reply or ''
end

local function take_from_held(ref)
  local _, _, _, fields = unpack_held(ref, redis.call('HGET', held, ref) or '')
  redis.call('HDEL', held, ref)
  redis.call('DEL', supplied_prefix .. ref)
  redis.call('ZREM', parked, ref)
  redis.call('ZREM', due, ref)
  return fields and fields[6] or ''
end

-- Take a request away by its place in `open`: its client, and the rest of the header of its result.
local function take(ref, place, spared)
  local lane_name, entry = string.match(place, '^(%S+) (%S+)$')
  if not lane_name then return take_from_held(ref), '- -' end
  return take_from_lane(lane_name, entry, spared), place
end
