-- columns: read groups of requests out of ARGV. Included, not run by itself.
-- A group is some words that its requests have in common, their number, and so many of each of its columns: whole columns are
-- handed on to commands without a loop in Lua.

-- The groups from ARGV[i] on: {words, first and last among all requests, at: where its first column begins}; nil if that is none.
local function read_groups(i, words, columns, most)
  local groups, position = {}, 0
  while i <= #ARGV do
    local count = tonumber(ARGV[i + words] or nil)
    if not (count and count >= 1 and count % 1 == 0 and position + count <= most) then return nil end
    local group = { first = position + 1, last = position + count, at = i + words + 1, count = count }
    for word = 1, words do group[word] = ARGV[i + word - 1] end
    i, position = group.at + columns * count, group.last
    if i > #ARGV + 1 then return nil end
    groups[#groups + 1] = group
  end
  return groups
end

-- One column of all groups, as a table.
local function column(groups, number)
  local function of(group)
    local first = group.at + (number - 1) * group.count
    return { unpack(ARGV, first, first + group.count - 1) }
  end
  if #groups == 1 then return of(groups[1]) end
  local all = {}
  for _, group in ipairs(groups) do
    for _, value in ipairs(of(group)) do all[#all + 1] = value end
  end
  return all
end
