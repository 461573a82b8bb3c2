-- dead: the bounds of the dead letters of a deployment. Included by the scripts that keep to them, not run by itself.
-- expects locals: dead, status (keys)
local DEAD_KEPT_S = 7 * 24 * 3600 -- large arguments of a dead letter are kept as long
local DEAD_KEPT = 10000

-- What falls out is counted: an operator should know that there were more.
local function bound_dead(now_ms)
  local count = redis.call('XTRIM', dead, 'MINID', string.format('%.0f', now_ms - DEAD_KEPT_S * 1000))
    + redis.call('XTRIM', dead, 'MAXLEN', DEAD_KEPT)
  if count > 0 then redis.call('HINCRBY', status, 'dead_dropped', count) end
end
