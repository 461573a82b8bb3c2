-- waking: delayed -> queued where due, at most `limit`. Included by the scripts that do it, not run by itself.
-- expects locals: due, limit, and what promoting expects
--include promoting
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local due_now = redis.call('ZRANGEBYSCORE', due, '-inf', now_ms, 'LIMIT', 0, limit)
for _, ref in ipairs(due_now) do
  redis.call('ZREM', due, ref)
  if redis.call('EXISTS', held_prefix .. ref) == 1 then promote(ref) end
end
settle_promoted()
