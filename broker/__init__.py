"""Everything that is true in Redis: keys, states, transitions, codec, connections, results, backlog, registry."""
