#!lua flags=allow-oom
-- watch: what became of some refs; those still open are noted for `who`, whom their end will be told. Twice is as once.
-- KEYS  1 open  2 result prefix  3 notes
-- ARGV  1 "readers" | "waiters" | "" (only look)  2 who   then refs
-- reply per ref: the stored result | "open" | "unknown"
local function note(ref)
  local field = ref .. ':' .. ARGV[1]
  local noted = redis.call('HGET', KEYS[3], field) or ''
  if not string.find(noted .. ' ', ' ' .. ARGV[2] .. ' ', 1, true) then
    redis.call('HSET', KEYS[3], field, noted .. ' ' .. ARGV[2])
  end
end

local answers = {}
for i = 3, #ARGV do
  local ref = ARGV[i]
  local stored = redis.call('GET', KEYS[2] .. ref)
  if stored then
    answers[#answers + 1] = stored
  elseif redis.call('HEXISTS', KEYS[1], ref) == 1 then
    answers[#answers + 1] = 'open'
    if ARGV[1] ~= '' then note(ref) end
  else
    answers[#answers + 1] = 'unknown'
  end
end
return answers
