"""A client of a cluster for tests: what they ask of a server as a whole, they ask of all primaries."""

from typing import Any

import redis
import redis.asyncio

from millstream.broker.cluster import seeds
from millstream.broker.cluster_control import ClusterControl
from millstream.config import Settings

ASKED_OF_ALL = {
    "ACL DELUSER", "ACL SETUSER", "CLIENT KILL", "CLIENT LIST", "CONFIG RESETSTAT", "CONFIG SET", "DBSIZE", "FLUSHALL",
    "INFO", "KEYS", "SCRIPT EXISTS", "SCRIPT FLUSH",
}  # fmt: skip
PREFIXES = ("ms:", "{ms:", "other:", "{other:")  # of keys, in tests with two namespaces, too


class WholeCluster(ClusterControl):
    """As the product's own, and: commands about a whole server go to all primaries."""

    def __init__(self, settings: Settings, name: str) -> None:
        super().__init__(settings, lambda url: redis.asyncio.Redis.from_url(url, protocol=2, client_name=name))

    async def execute_command(self, *args: Any, near: str = "", **options: Any) -> Any:
        names = {str(args[0]).upper(), " ".join(map(str, args[:2])).upper()}
        if near or not names & ASKED_OF_ALL:
            return await super().execute_command(*args, near=near, **options)
        nodes: list[Any] = await self.nodes()
        return sum_of([await node.execute_command(*args, **options) for node in nodes])

    def _key_in(self, args: tuple[Any, ...]) -> str:
        texts = [part.decode("latin-1") if isinstance(part, bytes) else part for part in args]
        return next((text for text in texts[1:] if isinstance(text, str) and text.startswith(PREFIXES)), "")


def open_blocking(url: str) -> Any:
    """A client without a loop, of a server or of all of a cluster."""
    return redis.RedisCluster.from_url(seeds(url)[0]) if "+cluster" in url else redis.Redis.from_url(url)


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
