"""One request that streams, on a real server and without a replica around it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from millstream.broker import scripts
from millstream.broker.cluster import dial_everywhere
from millstream.broker.codec import Codec, codec_for
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.link import Link
from millstream.config import Settings
from millstream.replicas.large import LargeValues
from millstream.replicas.producing import Producer
from millstream.replicas.streaming import Emitter, Emitters
from tests.helpers import CALLER, Claimed, deploy_config, seed_running, wait_until

LARGE = 200_000


class Bench:
    """Emitters on a server, and one request that streams."""

    def __init__(self, settings: Settings, redis: Control, keys: DeploymentKeys) -> None:
        self.settings, self.redis, self.keys = settings, redis, keys
        self.codec: Codec = codec_for(settings.secret_key, settings.namespace, keys.tag)
        self.large = LargeValues(settings, keys, "r-1")
        self.cancelled: list[tuple[bytes, str]] = []
        self.emitters = Emitters(keys, self.codec, self.large, 60, self._cancel)
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="bench")
        self.links: list[Link] = []
        self.one: Claimed
        self.emitter: Emitter
        self.stale = 0
        self._tasks: list[asyncio.Task[int]] = []

    async def start(self) -> None:
        await deploy_config(self.redis, self.keys)
        (self.one,) = await seed_running(self.redis, self.keys)
        await self.connect()

    async def connect(self) -> None:
        link = await dial_everywhere(self.settings, "test-writes")
        self.links.append(link)
        self.emitters.resume(link)

    def open(
        self, max_ahead: int = 64, *, one: Claimed | None = None, client: str = CALLER, json: bool = False
    ) -> Emitter:
        one = one or self.one
        place = (one.lane, one.entry)
        self.emitter = self.emitters.open(
            place, one.ref.encode(), client.encode(), max_ahead, self._on_stale, is_json=json
        )
        return self.emitter

    async def produce(self, call: Callable[[], Any], max_ahead: int = 64, **options: Any) -> int:
        """Run a streaming method to its end, as the executor does; the number of its items."""
        return await self.start_producing(call, max_ahead, **options)

    def start_producing(self, call: Callable[[], Any], max_ahead: int = 64, **options: Any) -> "asyncio.Task[int]":
        task = asyncio.create_task(self._produce(self.open(max_ahead, **options), call))
        self._tasks.append(task)
        return task

    async def produce_next_attempt(self, call: Callable[[], Any], max_ahead: int = 64) -> int:
        """As `produce`, of a request that ran before."""
        emitter = self.open(max_ahead)
        await emitter.go_on()
        return await self._produce(emitter, call)

    async def _produce(self, emitter: Emitter, call: Callable[[], Any]) -> int:
        try:
            is_async = asyncio.iscoroutinefunction(call)
            return await Producer(emitter, self.threads, lambda job: None).run(call, is_async=is_async)
        finally:
            emitter.end()

    async def holds(self, count: int) -> None:
        """Wait until so many items are stored."""

        async def check() -> bool:
            return len(await self.numbers()) == count

        await wait_until(check)

    async def numbers(self) -> list[int]:
        """Numbers of the items that are stored."""
        rows: Any = await self.redis.xrange(self.keys.items(self.one.ref))
        return [int(entry.partition(b"-")[0]) - 1 for entry, _ in rows]

    async def items(self) -> list[Any]:
        """The small items that are stored."""
        rows: Any = await self.redis.xrange(self.keys.items(self.one.ref))
        ref = self.one.ref.encode()
        return [
            self.codec.open("item", ref, fields[b"item"], b"%d" % (int(entry.partition(b"-")[0]) - 1))
            for entry, fields in rows
        ]

    async def consume(self, count: int, parts: list[str] | None = None) -> None:
        """What a reader does that has read so many."""
        await run(self.redis, scripts.consume(self.keys, self.one.ref, count, parts or []))

    async def values(self) -> list[str]:
        """Parts of the large values that are stored."""
        prefix = self.keys.value(self.one.ref, "")
        return sorted([key.decode().removeprefix(prefix) async for key in self.redis.scan_iter(f"{prefix}*")])

    def part(self, number: int) -> str:
        return f"{number}.{self.one.entry.decode()}"

    async def close(self) -> None:
        for place in list(self.emitters._emitters):
            self.emitters.close(place)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self.threads.shutdown(wait=True)
        self.large.close()
        for link in self.links:
            link.close()
            await link.lost

    async def _cancel(self, ref: bytes, why: str) -> None:
        self.cancelled.append((ref, why))

    def _on_stale(self) -> None:
        self.stale += 1
        self.emitters.close((self.one.lane, self.one.entry))


def counting(count: int) -> Callable[[], Any]:
    async def generate() -> AsyncIterator[int]:
        for number in range(count):
            yield number

    return generate


def counting_in_thread(count: int) -> Callable[[], Any]:
    def generate() -> Iterator[int]:
        yield from range(count)

    return generate


BOTH = pytest.mark.parametrize("counting", [counting, counting_in_thread])
Counting = Callable[[int], Callable[[], Any]]
