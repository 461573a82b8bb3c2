#!lua flags=allow-oom
-- emit: items of a streaming request, in order, as long as it runs at this very entry. An item that is there already
-- (from an attempt that died) stays as it was. Asking keeps what is not read yet alive, too. Twice is as once.
-- A full server takes items: they are as few as the stream may run ahead, and they stand between a request that holds
-- its slot and its arguments and the end that frees both.
-- KEYS  1 open  2 items  3 reply prefix  4 value prefix
-- ARGV  1 ref  2 "<lane> <entry>"  3 client  4 ttl_s  5 number of the first item (from 0)   then envelopes (none: just ask),
--       or "@<bytes> <part>": the envelope lies under its value key
-- reply {"running" | "stale", how many of them its reader has read: only where it was just asked, else 0}
--       Errors MISSING (a value key), OUTOFORDER (a later item is there, and this one is not): nothing was written
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return { 'stale', 0 } end
local INLINE_BYTES = 4096 -- larger items are announced, not sent: a stalled client is cut off at 32 MB
local LEAST_S = 60 -- a replica that waits for the reader asks more often than this
local ref, ttl_s, first_number, message = ARGV[1], math.max(LEAST_S, math.ceil(tonumber(ARGV[4]))), tonumber(ARGV[5]), {}

-- How many items there ever were.
local function emitted()
  local info = redis.pcall('XINFO', 'STREAM', KEYS[2])
  for i = 1, #info, 2 do -- none if there is no such key
    if info[i] == 'last-generated-id' then return tonumber(string.match(info[i + 1], '^%d+')) end
  end
  return 0
end

-- It cannot be added. That is as it should be if it is there, or was read.
local function is_lost(entry)
  local before = redis.call('XREVRANGE', KEYS[2], entry, '-', 'COUNT', 1)[1]
  return before and before[1] ~= entry
end

for i = 6, #ARGV do
  local part = string.byte(ARGV[i]) == 64 and string.match(ARGV[i], '^@%d+ (%S+)') -- 64: '@'
  if part and redis.call('EXPIRE', KEYS[4] .. ref .. ':' .. part, ttl_s) == 0 then
    local number = first_number + i - 6
    if emitted() <= number then -- else it has been read already: this is a repetition
      return redis.error_reply('MISSING the value of item ' .. string.format('%.0f', number))
    end
  end
end
for i = 6, #ARGV do
  local number = first_number + i - 6
  local entry = string.format('%.0f-1', number + 1)
  local added = redis.pcall('XADD', KEYS[2], entry, 'item', ARGV[i])
  if type(added) ~= 'table' then
    local stored = string.format('item %.0f\n', number) .. (#ARGV[i] > INLINE_BYTES and '' or ARGV[i] .. '\n')
    message[#message + 1] = '$' .. #ref .. '\r\n' .. ref .. '\r\n$' .. #stored .. '\r\n' .. stored .. '\r\n'
  elseif not string.find(tostring(added.err), 'equal or smaller', 1, true) then
    return redis.error_reply(tostring(added.err)) -- it is no stream: the first one failed, nothing was written
  elseif is_lost(entry) then
    return redis.error_reply('OUTOFORDER item ' .. number .. ' comes after a later one')
  end
end
if #message > 0 and ARGV[3] ~= '' then
  redis.call('SPUBLISH', KEYS[3] .. ARGV[3], '*' .. #message * 2 .. '\r\n' .. table.concat(message))
end
local read = 0
if redis.call('EXPIRE', KEYS[2], ttl_s) == 1 and #ARGV == 5 then
  local first = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1]
  read = first and tonumber(string.match(first[1], '^%d+')) - 1 or emitted()
end
return { 'running', read }
