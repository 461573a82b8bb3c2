#!lua flags=allow-oom
-- discard: parked | delayed | queued | running -> cancelled, because the deployment goes. One step of a scan.
-- KEYS  1 open  2 notes  3 result prefix  4 reply prefix  5 lane prefix  6 held prefix  7 parked  8 due
-- ARGV  1 cursor  2 at about so many  3 ttl_s  4 why, as the caller will read it  5 "all" | "waiting" (running ones may finish)
-- reply {next cursor ("0": through), {ref, waiter, ...}}
local open, notes, results, replies, ttl_s = KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[3]
--include ending
local function take_from_lane(lane_name, entry)
  local lane = KEYS[5] .. lane_name
  if ARGV[5] == 'waiting' and #redis.call('XPENDING', lane, 'replicas', entry, entry, 1) > 0 then return nil end
  local found, client = redis.call('XRANGE', lane, entry, entry)[1], ''
  for i = 1, found and #found[2] or 0, 2 do
    if found[2][i] == 'reply' then client = found[2][i + 1] end
  end
  redis.call('XACK', lane, 'replicas', entry)
  redis.call('XDEL', lane, entry)
  return client
end

local function take_from_held(ref)
  local client = redis.call('HGET', KEYS[6] .. ref, 'reply') or ''
  redis.call('DEL', KEYS[6] .. ref)
  redis.call('ZREM', KEYS[7], ref)
  redis.call('ZREM', KEYS[8], ref)
  return client
end

local scanned = redis.call('HSCAN', open, ARGV[1], 'COUNT', ARGV[2])
for i = 1, #scanned[2], 2 do
  local ref, lane_name, entry = scanned[2][i], string.match(scanned[2][i + 1], '^(%S+) (%S+)$')
  local client
  if lane_name then client = take_from_lane(lane_name, entry) else client = take_from_held(ref) end
  if client then conclude(ref, client, 'cancelled ' .. (lane_name or '-') .. ' ' .. (entry or '-'), ARGV[4]) end
end
publish()
return { scanned[1], waiters }
