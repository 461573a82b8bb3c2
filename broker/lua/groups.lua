#!lua flags=allow-oom
-- groups: make the lanes' consumer groups where they are missing, from the beginning of each stream. Twice is as once.
-- KEYS  1-4 lanes
-- reply how many were made
local made = 0
for _, lane in ipairs(KEYS) do
  local created = redis.pcall('XGROUP', 'CREATE', lane, 'replicas', '0', 'MKSTREAM')
  if not created.err then
    made = made + 1
  elseif not string.find(tostring(created.err), 'BUSYGROUP', 1, true) then
    return redis.error_reply(tostring(created.err))
  end
end
return made
