-- limits: what other scripts must know of a deployment's config. Included by the scripts that store one.
-- max_queued and timeout_ms are there only where they are set ("" if not): submit looks at them for each batch.
local function set_limits(config, max_attempts, result_ttl_s, max_queued, timeout_ms)
  redis.call('HSET', config, 'max_attempts', max_attempts, 'result_ttl_s', result_ttl_s)
  for field, value in pairs({ max_queued = max_queued, timeout_ms = timeout_ms }) do
    if value == '' then redis.call('HDEL', config, field) else redis.call('HSET', config, field, value) end
  end
end
