#!lua flags=allow-oom
-- watch: what became of some refs; those still open are noted for somebody whom their end will be told. Twice is as once.
-- KEYS  1 open  2 result prefix  3 notes
-- ARGV  1 "readers" | "waiters" | "" (only look)   then per ref: ref, who ("" if only looked at)
-- reply per ref: the stored result | "open" | "unknown"
if #ARGV < 3 then return {} end
local keys, refs = {}, {}
for i = 2, #ARGV, 2 do
  refs[#refs + 1] = ARGV[i]
  keys[#keys + 1] = KEYS[2] .. ARGV[i]
end
local answers, open, fields = redis.call('MGET', unpack(keys)), nil, {}
for position, stored in ipairs(answers) do
  if stored == 'open' or stored == 'unknown' then
    answers[position] = stored .. '\n' -- that is no result: some other program wrote it
  elseif not stored then
    open = open or redis.call('HMGET', KEYS[1], unpack(refs))
    answers[position] = open[position] and 'open' or 'unknown'
    if open[position] then fields[#fields + 1] = refs[position] .. ':' .. ARGV[1] end
  end
end
if ARGV[1] == '' or #fields == 0 then return answers end

local noted, number = {}, 0
local before = redis.call('HMGET', KEYS[3], unpack(fields))
for position, answer in ipairs(answers) do
  if answer == 'open' then
    number = number + 1
    local field, who = fields[number], ' ' .. ARGV[position * 2 + 1]
    local names = noted[field] or before[number] or ''
    if not string.find(names .. ' ', who .. ' ', 1, true) then noted[field] = names .. who end
  end
end
local flat = {}
for field, names in pairs(noted) do
  flat[#flat + 1] = field
  flat[#flat + 1] = names
end
if #flat > 0 then redis.call('HSET', KEYS[3], unpack(flat)) end
return answers
