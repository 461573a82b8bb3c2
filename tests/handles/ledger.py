"""A deployment that notes every run, and what its requests have left on the server."""

from collections import Counter
from typing import Any

import anyio

from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys
from millstream.handles import engines
from tests.handles.held import Notes

LARGE = 1_000_000


class Ledger:
    """Notes every run."""

    def __init__(self, notes: Notes | None = None) -> None:
        self._notes = notes
        self.runs: Counter[Any] = Counter()

    async def __call__(self, x: Any) -> Any:
        self.runs[x] += 1
        return x

    async def held(self, x: Any) -> Any:
        assert self._notes is not None
        self.runs[x] += 1
        await self._notes.gate.wait()
        return x

    async def large(self) -> bytes:
        return b"x" * LARGE

    async def fail(self) -> None:
        raise ValueError("no")

    async def take(self, *values: Any) -> Any:
        return values

    async def counted(self) -> Counter[Any]:
        return self.runs


async def left(redis: Control) -> list[str]:
    """The results and large values on the server."""
    keys = DeploymentKeys("ms", "app.Ledger")
    found: list[bytes] = []
    for prefix in (keys.result_prefix, keys.value_prefix, keys.payload_prefix):
        found += [key async for key in redis.scan_iter(f"{prefix}*", count=10_000)]
    return sorted(key.decode() for key in found)


async def is_clean(redis: Control) -> bool:
    return not await left(redis)


async def passes(redis: Control) -> None:
    """Return when what was to be deleted by now has been."""
    for engine in (engines.current(), engines.background().engine):
        engine.loop.call_soon_threadsafe(engine.drops.flush)
    await anyio.sleep(0.1)
