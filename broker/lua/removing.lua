-- removing: take many entries out of a lane and out of its pending list. Included, not run by itself.
-- XDEL looks for each entry from the beginning of its node, past all that was deleted there: 18,000 instructions of the server
-- each. Most replicas end their requests in the order in which they came, so that all up to some entry have ended; then one
-- XTRIM does it for all of them.
local FEW = 4 -- entries: for less it costs more than it saves

-- Is one entry id certainly smaller than another, whose dash is there? By text, as long as their times have as many digits.
local function is_before(id, other, dash)
  if string.byte(id, dash) ~= 45 then return false end
  if #id ~= #other and string.sub(id, 1, dash) == string.sub(other, 1, dash) then return #id < #other end
  return id < other
end

-- Remove those that stand before all that is still running; answers the others.
local function trim(lane, entries)
  local bound = redis.call('XPENDING', lane, 'replicas', '-', '+', 1)[1]
  if bound then
    bound = bound[1]
  else
    local ms, number = string.match(entries[#entries], '^(%d+)-(%d+)$')
    bound = ms .. '-' .. string.format('%.0f', number + 1)
  end
  local dash, others = string.find(bound, '-', 1, true), {}
  for _, entry in ipairs(entries) do
    if not is_before(entry, bound, dash) then others[#others + 1] = entry end
  end
  if #others < #entries then redis.call('XTRIM', lane, 'MINID', bound) end
  return others
end

local function without(staying, entries)
  local others = {}
  for _, entry in ipairs(entries) do
    if not staying[entry] then others[#others + 1] = entry end
  end
  return others
end

local function remove(lane, entries)
  if #entries == 0 then return end
  local acknowledged = redis.call('XACK', lane, 'replicas', unpack(entries))
  -- All of them were pending, so all that came before them has been delivered: what of it is not pending has ended.
  if #entries >= FEW and acknowledged == #entries then entries = trim(lane, entries) end
  if #entries > 0 then redis.call('XDEL', lane, unpack(entries)) end
end
