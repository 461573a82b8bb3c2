"""What the workloads deploy."""

import time
from collections.abc import AsyncIterator
from typing import Any

from millstream import serve


@serve.deployment
class NoOp:
    """Gives back the first of its arguments. Others bound to it are there to be deployed."""

    def __init__(self, *others: Any) -> None:
        pass

    async def __call__(self, x: Any, *others: Any) -> Any:
        return x

    async def count(self, to: int) -> AsyncIterator[int]:
        for x in range(to):
            yield x


@serve.deployment
class Blocking:
    """As NoOp, in a thread."""

    def __call__(self, x: Any) -> Any:
        return x


@serve.deployment
class Burn:
    """Pure Python that holds its processor."""

    def __call__(self, loops: int) -> int:
        return burn(loops)


@serve.deployment
class Clock:
    """When it ran, by the clock that all processes of a machine share."""

    async def __call__(self, _: int) -> float:
        return time.monotonic()


def burn(loops: int) -> int:
    total = 0
    for number in range(loops):
        total += number & 7
    return loops
