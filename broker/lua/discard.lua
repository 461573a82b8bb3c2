#!lua flags=allow-oom
-- discard: parked | delayed | queued | running -> cancelled, because the deployment goes. One step of a scan.
-- KEYS  as of cancel
-- ARGV  1 cursor  2 at about so many  3 ttl_s  4 why, as the caller will read it  5 "all" | "waiting" (running ones may finish)
-- reply {next cursor ("0": through), {ref, waiter, ...}}
local open, notes, results, replies = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local lane_prefix, held, parked, due, supplied_prefix = KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[13]
local deadlines, holds, payloads, orders_prefix, ttl_s = KEYS[9], KEYS[10], KEYS[11], KEYS[12], ARGV[3]
--include ending
--include taking
local scanned = redis.call('HSCAN', open, ARGV[1], 'COUNT', ARGV[2])
for i = 1, #scanned[2], 2 do
  local ref = scanned[2][i]
  local client, where = take(ref, scanned[2][i + 1], ARGV[5] == 'waiting')
  if client then conclude(ref, client, 'cancelled ' .. where .. '\n' .. ARGV[4]) end
end
publish()
return { scanned[1], waiters }
