-- waking: delayed -> queued where due, at most `limit`. Included by the scripts that do it, not run by itself.
-- expects locals: due, limit, and what promoting expects
--include promoting
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local due_now = redis.call('ZRANGEBYSCORE', due, '-inf', now_ms, 'LIMIT', 0, limit)
if #due_now > 0 then
  redis.call('ZREM', due, unpack(due_now))
  local requests = redis.call('HMGET', held, unpack(due_now))
  for position, ref in ipairs(due_now) do
    if requests[position] then promote(ref, requests[position]) end
  end
  settle_promoted()
end
