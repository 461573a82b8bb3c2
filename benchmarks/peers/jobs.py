"""What a worker knows by the name of its module, which must not be `__main__` for the client."""

from typing import Any


def echo(value: Any) -> Any:
    return value
