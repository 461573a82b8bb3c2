"""A client of a cluster for tests: what they ask of a server as a whole, they ask of all primaries."""

from collections.abc import AsyncIterator
from typing import Any

import redis.asyncio
from redis.asyncio.client import Pipeline

from millstream.broker.cluster_control import ClusterControl
from millstream.broker.connection import Control
from millstream.config import Settings

ASKED_OF_ALL = {
    "ACL DELUSER", "ACL SETUSER", "CLIENT KILL", "CLIENT LIST", "CONFIG RESETSTAT", "CONFIG SET", "DBSIZE", "FLUSHALL",
    "INFO", "KEYS", "SCRIPT EXISTS", "SCRIPT FLUSH",
}  # fmt: skip


class WholeCluster(ClusterControl):
    """As the product's own, and: commands about a whole server go to all primaries, and pipelines to several."""

    def __init__(self, settings: Settings, name: str) -> None:
        super().__init__(settings, lambda url: redis.asyncio.Redis.from_url(url, protocol=2, client_name=name))

    async def nodes(self) -> list[Control]:
        """A client of each primary."""
        await self.node_of("")
        assert self._slots is not None
        for url in self._slots.urls:
            self._nodes.setdefault(url, self._open_node(url))
        return [self._nodes[url] for url in self._slots.urls]

    async def execute_command(self, *args: Any, near: str = "", **options: Any) -> Any:
        names = {str(args[0]).upper(), " ".join(map(str, args[:2])).upper()}
        if near or not names & ASKED_OF_ALL:
            return await super().execute_command(*args, near=near, **options)
        nodes: list[Any] = await self.nodes()
        return sum_of([await node.execute_command(*args, **options) for node in nodes])

    def _key_in(self, args: tuple[Any, ...]) -> str:
        return super()._key_in(tuple(part.decode("latin-1") if isinstance(part, bytes) else part for part in args))

    async def scan_iter(self, *args: Any, **options: Any) -> AsyncIterator[Any]:  # type: ignore[override]
        for node in await self.nodes():
            async for key in node.scan_iter(*args, **options):
                yield key

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Any:
        return super().pipeline(transaction) if transaction else SplitPipeline(self)


class SplitPipeline(Pipeline):
    """Each command goes to the node of its key."""

    def __init__(self, whole: WholeCluster) -> None:
        super().__init__(whole.connection_pool, whole.response_callbacks, False, None)
        self._whole = whole

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        queued, self.command_stack = self.command_stack, []
        by_node: dict[Control, list[int]] = {}
        for number, command in enumerate(queued):
            by_node.setdefault(await self._whole.node_of(self._whole.key_of([command])), []).append(number)
        replies: list[Any] = [None] * len(queued)
        for node, numbers in by_node.items():
            async with node.pipeline(transaction=False) as part:
                part.command_stack = [queued[number] for number in numbers]
                for number, reply in zip(numbers, await part.execute(raise_on_error), strict=True):
                    replies[number] = reply
        return replies


def sum_of(answers: list[Any]) -> Any:
    """What the nodes say, as if one had said it."""
    match answers[0]:
        case bool():
            return all(answers)
        case [bool(), *_]:
            return [any(some) for some in zip(*answers, strict=True)]
        case int() | float():
            return sum(answers)
        case list():
            return [one for answer in answers for one in answer]
        case dict():
            names = dict.fromkeys(name for answer in answers for name in answer)
            return {name: sum_of([answer[name] for answer in answers if name in answer]) for name in names}
    return answers[0]
