#!lua flags=allow-oom
-- wake: delayed -> queued where due; for a caller that knows when. Sweepers find what nobody wakes.
-- KEYS  1 due  2 open  3 held  4 supplied prefix  5 lane prefix
-- ARGV  1 at most so many
-- reply how many
local due, open, held, supplied_prefix, lane_prefix, limit = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], ARGV[1]
--include waking
return #due_now
