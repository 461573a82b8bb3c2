"""The web page and HTTP API over what is in Redis. Reads only; holds no state. An extra: `millstream[dashboard]`."""
