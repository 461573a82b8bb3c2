"""The caller's side: handles, refs, get and wait, and the engine that talks to the server for them."""
