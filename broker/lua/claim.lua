#!lua flags=allow-oom
-- claim: queued -> running, without blocking: lane after lane, never more than a fair share of what waits.
-- KEYS  1-4 lanes  5 replicas
-- ARGV  1 replica  2 at most so many  3 direct reads that may follow at most
-- reply {direct, {{lane, {{entry id, {field, value, ...}}, ...}}, ...}}; `direct`: the backlog of the last lane is so deep
-- that this replica may read it so many times more with plain XREADGROUPs, which cost the server 7 us less per request
--include pending
local count, live, claimed = tonumber(ARGV[2]), redis.call('HLEN', KEYS[5]), {}
local free, waiting, direct = count, nil, 0
if live > 1 then
  waiting = 0
  for lane = 1, 4 do
    local entries = redis.call('XLEN', KEYS[lane])
    if entries > 0 then waiting = waiting + entries - pending_in(KEYS[lane]) end
  end
  free = math.min(free, math.ceil(waiting / live))
end
for lane = 1, 4 do
  if free <= 0 then break end
  local got = redis.pcall('XREADGROUP', 'GROUP', 'replicas', ARGV[1], 'COUNT', free, 'STREAMS', KEYS[lane], '>')
  -- An error after something was taken would leave that in the pending list of a replica that never hears of it.
  if got and got.err then
    if #claimed == 0 then return got end
    break
  end
  if got then
    claimed[#claimed + 1] = got[1]
    free = free - #got[1][2]
    if #got[1][2] == count then
      direct = tonumber(ARGV[3])
      if waiting then direct = math.min(direct, math.floor((waiting - count) / (live * count))) end
    end
  end
end
return { math.max(0, direct), claimed }
