#!lua flags=no-writes
-- backlog: one exact reading of a deployment. `lag` of XINFO is not used: it is NULL once entries are deleted.
-- KEYS  1-4 lanes  5 parked  6 due
-- reply {waiting, in flight, parked, delayed, age of the oldest waiting in ms | -1, arrivals so far, due now, last ids of the lanes}
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)

local function named(rows)
  local values = {}
  for i = 1, #rows, 2 do values[rows[i]] = rows[i + 1] end
  return values
end

local waiting, in_flight, arrivals, oldest_ms, last_ids = 0, 0, 0, nil, {}
for lane = 1, 4 do
  last_ids[lane] = '0-0'
  local stream = redis.pcall('XINFO', 'STREAM', KEYS[lane])
  if not stream.err then
    stream = named(stream)
    last_ids[lane] = stream['last-generated-id']
    if lane > 1 then arrivals = arrivals + (stream['entries-added'] or stream['length']) end
    local group = redis.call('XINFO', 'GROUPS', KEYS[lane])[1]
    group = group and named(group) or { pending = 0, ['last-delivered-id'] = '0-0' }
    in_flight = in_flight + group.pending
    if stream.length > group.pending then
      waiting = waiting + stream.length - group.pending
      local head = redis.call('XRANGE', KEYS[lane], '(' .. group['last-delivered-id'], '+', 'COUNT', 1)[1]
      local head_ms = head and tonumber(string.match(head[1], '^%d+'))
      if head_ms and (not oldest_ms or head_ms < oldest_ms) then oldest_ms = head_ms end
    end
  end
end
local age_ms = oldest_ms and math.max(0, now_ms - oldest_ms) or -1
return {
  waiting, in_flight, redis.call('ZCARD', KEYS[5]), redis.call('ZCARD', KEYS[6]), age_ms, arrivals,
  redis.call('ZCOUNT', KEYS[6], '-inf', now_ms), last_ids,
}
