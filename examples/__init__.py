"""Examples: `hello.py`, `digits/` (what `make demo` runs) and `fastapi_app/`."""
