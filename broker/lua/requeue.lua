#!lua
-- requeue: dead -> queued, each of the dead letters that can be sent again: attempts from 1, no deadline, history kept.
-- KEYS  1 config  2 dead  3 open  4 result prefix  5 lane prefix  6 notes  7 payload prefix
-- ARGV  entry ids in the stream of dead letters
-- reply per letter "queued" | "gone" (requeued, dropped or bounded away before) | "open" or "ended" (its ref is used anew)
-- | "missing" (its payload) | "unusable" (it is no request). Error NODEPLOYMENT (no config): nothing was written
if redis.call('EXISTS', KEYS[1]) == 0 then return redis.error_reply('NODEPLOYMENT this deployment does not exist') end
local open, results, notes, payloads = KEYS[3], KEYS[4], KEYS[6], KEYS[7]
local LANES = { high = true, normal = true, low = true }
local OF_LAST_TIME = { attempt = true, retries = true, deadline = true, lane = true }

local function read(entry)
  local found = redis.call('XRANGE', KEYS[2], entry, entry)[1]
  if not found then return nil end
  local named = {}
  for i = 1, #found[2], 2 do named[found[2][i]] = found[2][i + 1] end
  return found[2], named
end

local function why_not(letter)
  if not letter then return 'gone' end
  if not (letter.ref and letter.method and letter.body) then return 'unusable' end
  if redis.call('HEXISTS', open, letter.ref) == 1 then return 'open' end
  local state = string.match(redis.call('GETRANGE', results .. letter.ref, 0, 99), '^%S*')
  if state ~= '' and state ~= 'dead' then return 'ended' end
  if letter.payload and redis.call('PERSIST', payloads .. letter.ref) == 0
    and redis.call('EXISTS', payloads .. letter.ref) == 0 then
    return 'missing'
  end
end

local function requeue(entry)
  local fields, letter = read(entry)
  local refused = why_not(letter)
  if refused then return refused end
  local lane, again = LANES[letter.lane] and letter.lane or 'normal', {}
  for i = 1, #fields, 2 do
    if not OF_LAST_TIME[fields[i]] then
      again[#again + 1] = fields[i]
      again[#again + 1] = fields[i + 1]
    end
  end
  redis.call('HSET', open, letter.ref, lane .. ' ' .. redis.call('XADD', KEYS[5] .. lane, '*', unpack(again)))
  if letter.payload then redis.call('HSET', notes, letter.ref .. ':payload', 1) end
  redis.call('UNLINK', results .. letter.ref)
  redis.call('XDEL', KEYS[2], entry)
  return 'queued'
end

local answers = {}
for i, entry in ipairs(ARGV) do answers[i] = requeue(entry) end
return answers
