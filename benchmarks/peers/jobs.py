"""What rq's worker imports by its name."""

from typing import Any


def echo(value: Any) -> Any:
    return value
