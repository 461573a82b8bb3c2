"""A small application and its tests: `python -m pytest examples/testing`."""
