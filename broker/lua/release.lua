#!lua flags=allow-oom
-- release: running -> queued (next attempt, in `returned`) | dead | cancelled (its deployment is being deleted); what one
-- dead replica holds in one lane, 100 at a time. When nothing is left its consumer is deleted. Twice is as once.
-- KEYS  1 lane  2 returned  3 open  4 notes  5 result prefix  6 reply prefix  7 dead  8 config  9 lease  10 deadlines
--       11 holds  12 payload prefix  13 status
-- ARGV  1 lane name  2 replica  3 cause  4 "died" (seen by its parent) | "expired" (only while it has no lease)
-- reply {"alive"} | {"released", requeued, buried, more, {ref, waiter, ...}}
if ARGV[4] == 'expired' and redis.call('EXISTS', KEYS[9]) == 1 then return { 'alive' } end
local lane, lane_name, replica = KEYS[1], ARGV[1], ARGV[2]
local limits = redis.call('HMGET', KEYS[8], 'max_attempts', 'result_ttl_s')
local open, notes, results, replies = KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local deadlines, holds, payloads = KEYS[10], KEYS[11], KEYS[12]
local dead, status = KEYS[7], KEYS[13]
local max_attempts, ttl_s = tonumber(limits[1] or '3'), limits[2] or '3600'
local is_deleted = not limits[1] -- nobody will run it again, and with max_attempts=1 nobody should
--include ending
--include dead
--include burying
local time = redis.call('TIME')
local cause = { replica = replica, cause = ARGV[3], at_ms = time[1] * 1000 + math.floor(time[2] / 1000) }

local function take(entry, fields)
  redis.call('XACK', lane, 'replicas', entry)
  redis.call('XDEL', lane, entry)
  return read_request(fields)
end

local requeued, buried = 0, 0
local pending = redis.pcall('XPENDING', lane, 'replicas', '-', '+', 100, replica)
if pending.err then return { 'released', 0, 0, 0, {} } end
for _, row in ipairs(pending) do
  local entry = row[1]
  local found = redis.call('XRANGE', lane, entry, entry)[1]
  if not found then
    redis.call('XACK', lane, 'replicas', entry)
  else
    local request = take(entry, found[2])
    cause.attempt = request.attempt
    local history = add_to_history(request, cause)
    local place = lane_name .. ' ' .. entry
    local deaths = request.attempt - (tonumber(request.retries) or 0) -- what its code raised is counted apart
    -- What `open` does not name is no request: kept to be looked at.
    if is_deleted and is_open_at(request, place) then
      conclude(request.ref, request.reply or '', 'cancelled ' .. place .. '\nits deployment was deleted')
    elseif not is_open_at(request, place) or deaths >= (tonumber(request.max_attempts) or max_attempts) then
      bury(request, lane_name, entry, history)
      buried = buried + 1
    else
      request.attempt, request.history, request.lane = request.attempt + 1, history, request.lane or lane_name
      redis.call('HSET', open, request.ref, 'returned ' .. add_entry(KEYS[2], request, '*'))
      requeued = requeued + 1
    end
  end
end
publish()
if buried > 0 then bound_dead(cause.at_ms) end
local more = #pending == 100 and 1 or 0
if more == 0 then redis.call('XGROUP', 'DELCONSUMER', lane, 'replicas', replica) end
return { 'released', requeued, buried, more, waiters }
