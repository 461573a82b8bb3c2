"""The control connections into a Redis Cluster: a redis-py client whose commands go each to the node of its key.

redis-py's own cluster client refuses reads of streams in several slots, transactions in older releases, and commands
about a connection of a certain node; and it asks every node for its list of commands first.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import redis.asyncio
import redis.exceptions
from redis.asyncio.client import Pipeline, PubSub

from millstream.broker.cluster import SlotMap, discover, seeds
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError

WAITS_S = (0.05, 0.2, 0.5)  # before a command is tried again, by a new map
LOST = (
    redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, redis.exceptions.AskError,
    redis.exceptions.TryAgainError, redis.exceptions.ClusterDownError, redis.exceptions.MasterDownError,
    redis.exceptions.ReadOnlyError,
)  # fmt: skip


class ClusterControl(redis.asyncio.Redis):
    """Made by `open_control`. What goes wrong with nodes and slots is a ConnectionError, after some tries."""

    def __init__(self, settings: Settings, open_node: Callable[[str], redis.asyncio.Redis]) -> None:
        self._settings, self._open_node = settings, open_node
        self._nodes: dict[str, redis.asyncio.Redis] = {}
        self._slots: SlotMap | None = None
        super().__init__(connection_pool=open_node(seeds(settings.url)[0]).connection_pool)
        self._prefixes = f"{settings.namespace}:", f"{{{settings.namespace}:"

    async def execute_command(self, *args: Any, near: str = "", **options: Any) -> Any:
        """One command, where its first key is; without any, where `near` is, else anywhere."""
        key = self._key_in(args) or near
        for wait_s in (*WAITS_S, None):
            try:
                node = await self.node_of(key)
                return await node.execute_command(*args, **options)  # type: ignore[no-untyped-call]
            except (*LOST, BrokerUnavailableError) as e:
                self._slots = None
                if wait_s is None:
                    raise cannot_take(e) from e
            await asyncio.sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    async def node_of(self, key: str) -> redis.asyncio.Redis:
        """A client of the node that has this key; of any one for ""."""
        if self._slots is None:
            self._slots = await discover(self._settings)
        url = self._slots.url_of(key) if key else random.choice(self._slots.urls)
        return self._node_at(url)

    async def nodes(self) -> list[redis.asyncio.Redis]:
        """A client of each primary, for what each knows of itself only."""
        if self._slots is None:
            self._slots = await discover(self._settings)
        return [self._node_at(url) for url in self._slots.urls]

    def _node_at(self, url: str) -> redis.asyncio.Redis:
        if url not in self._nodes:
            self._nodes[url] = self._open_node(url)
        return self._nodes[url]

    async def scan_iter(self, *args: Any, **options: Any) -> AsyncIterator[Any]:  # type: ignore[override]
        """The keys of one node after the other. A node that cannot be asked is a ConnectionError."""
        try:
            for node in await self.nodes():
                async for key in node.scan_iter(*args, **options):
                    yield key
        except (*LOST, BrokerUnavailableError) as e:
            self._slots = None
            raise cannot_take(e) from e

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> "ClusterPipeline":
        """All keys of a transaction must share a slot."""
        return ClusterPipeline(self, transaction)

    def pubsub(self, **options: Any) -> PubSub:
        """Plain channels are heard on every node: on one of those that we know of."""
        known = [self._nodes[url] for url in (self._slots.urls if self._slots else ()) if url in self._nodes]
        return PubSub(random.choice(known).connection_pool if known else self.connection_pool, **options)

    async def xread(  # type: ignore[override]  # its type changes from release to release
        self, streams: Any, count: int | None = None, block: int | None = None
    ) -> Any:
        """Streams of several slots are read at once; what the first of them brings is returned."""
        by_tag: dict[str, dict[Any, Any]] = {}
        for name, last_id in streams.items():
            by_tag.setdefault(name[: name.find("}") + 1], {})[name] = last_id
        if len(by_tag) == 1:
            return await super().xread(streams, count, block)
        reads = [
            asyncio.ensure_future(super(ClusterControl, self).xread(part, count, block)) for part in by_tag.values()
        ]
        try:
            for read in asyncio.as_completed(reads):
                if found := await read:
                    return found
            return []
        finally:
            for one in reads:
                one.cancel()
            await asyncio.gather(*reads, return_exceptions=True)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        for node in self._nodes.values():
            await node.aclose(close_connection_pool)
        self._nodes = {}
        await self.connection_pool.aclose()

    def forget_map(self) -> None:
        self._slots = None

    def key_of(self, commands: list[Any]) -> str:
        return next((key for args, _ in commands if (key := self._key_in(args))), "")

    def _key_in(self, args: tuple[Any, ...]) -> str:
        return next((part for part in args[1:] if isinstance(part, str) and part.startswith(self._prefixes)), "")


class ClusterPipeline(Pipeline):
    """Commands that go out together: those of a transaction to one node, others each to the node of its key."""

    def __init__(self, control: ClusterControl, transaction: bool) -> None:
        super().__init__(control.connection_pool, control.response_callbacks, transaction, None)
        self._control = control

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        try:
            replies = await self._execute_on(await self._parts(), raise_on_error)
            if (lost := next((reply for reply in replies if isinstance(reply, LOST)), None)) is not None:
                raise lost
        except (*LOST, BrokerUnavailableError) as e:
            self._control.forget_map()
            raise cannot_take(e) from e
        return replies

    async def _execute_on(self, parts: dict[redis.asyncio.Redis, list[int]], raise_on_error: bool) -> list[Any]:
        if len(parts) > 1:
            return await self._execute_apart(parts, raise_on_error)
        for node in parts:
            self.connection_pool = node.connection_pool
        replies: list[Any] = await super().execute(raise_on_error)
        return replies

    async def _parts(self) -> dict[redis.asyncio.Redis, list[int]]:
        """Whom to ask -> the numbers of the commands for it."""
        stack: list[Any] = self.command_stack
        if self.is_transaction:
            return {await self._control.node_of(self._control.key_of(stack)): list(range(len(stack)))}
        parts: dict[redis.asyncio.Redis, list[int]] = {}
        for number, command in enumerate(stack):
            parts.setdefault(await self._control.node_of(self._control.key_of([command])), []).append(number)
        return parts

    async def _execute_apart(self, parts: dict[redis.asyncio.Redis, list[int]], raise_on_error: bool) -> list[Any]:
        stack: list[Any] = self.command_stack
        replies: list[Any] = [None] * len(stack)
        for node, numbers in parts.items():
            async with node.pipeline(transaction=False) as part:
                part.command_stack = [stack[number] for number in numbers]
                for number, reply in zip(numbers, await part.execute(raise_on_error), strict=True):
                    replies[number] = reply
        await self.reset()  # type: ignore[no-untyped-call]
        return replies


def cannot_take(error: Exception) -> redis.exceptions.ConnectionError:
    return redis.exceptions.ConnectionError(f"the cluster cannot take commands now ({error})")
