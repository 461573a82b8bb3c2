#!lua flags=allow-oom
-- claim: queued -> running, without blocking: lane after lane, never more than a fair share of what waits.
-- KEYS  1-4 lanes  5 replicas
-- ARGV  1 replica  2 free slots
-- reply as XREADGROUP: {{lane, {{entry id, {field, value, ...}}, ...}}, ...}. NOGROUP only if nothing was taken
local free, live, claimed = tonumber(ARGV[2]), redis.call('HLEN', KEYS[5]), {}
if live > 1 then
  local waiting = 0
  for lane = 1, 4 do
    local entries = redis.call('XLEN', KEYS[lane])
    if entries > 0 then waiting = waiting + entries - redis.call('XPENDING', KEYS[lane], 'replicas')[1] end
  end
  free = math.min(free, math.ceil(waiting / live))
end
for lane = 1, 4 do
  if free <= 0 then break end
  local got = redis.pcall('XREADGROUP', 'GROUP', 'replicas', ARGV[1], 'COUNT', free, 'STREAMS', KEYS[lane], '>')
  -- An error after something was taken would leave that in the pending list of a replica that never hears of it.
  if got and got.err then return #claimed > 0 and claimed or got end
  if got then
    claimed[#claimed + 1] = got[1]
    free = free - #got[1][2]
  end
end
return claimed
