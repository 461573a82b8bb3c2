"""Links into a Redis Cluster: which node has a key, and links whose commands go each to the node of its key.

Slots move, and primaries fail. A link is as old as the map that it was made by: when that is out of date the link is
lost, and whoever owns it connects anew, as after any other loss. Nothing here follows a redirect.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from redis.asyncio.connection import parse_url
from redis.crc import key_slot

from millstream.broker import link as single
from millstream.broker.call import Call
from millstream.broker.link import UNREACHABLE, Callback, Link, cannot_reach, connect
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError

T = TypeVar("T")
NODE_TIMEOUT_S = 1.0  # a node that does not answer for so long is passed over for another one
WATCH_S = 2.0  # between looks whether the map is still true: nobody tells a link to a primary that is frozen
_seen: dict[str, list[str]] = {}  # URL of a cluster -> those of its nodes, as last seen: its seeds may be gone


@dataclass(frozen=True)
class SlotMap:
    """Which primary has which slots: (first, last, URL of the node), in order."""

    ranges: tuple[tuple[int, int, str], ...]

    @cached_property
    def urls(self) -> list[str]:
        return sorted({url for _, _, url in self.ranges})

    def url_of(self, key: str) -> str:
        """Raises BrokerUnavailableError where no node has the slot of this key."""
        slot = key_slot(key.encode())
        for first, last, url in self.ranges:
            if first <= slot <= last:
                return url
        raise BrokerUnavailableError(f"no node of the cluster has slot {slot}")


def seeds(url: str) -> list[str]:
    """The nodes that the URL of a cluster names, each as a URL of its own."""
    return [with_node(url, node) for node in _parts(url)[1].split(",")]


def with_node(url: str, node: str) -> str:
    """One node of a cluster, `host:port`, as a URL with the credentials and options of the cluster's."""
    before, _, options = _parts(url)
    return f"{before}{node}{options}"


def _parts(url: str) -> tuple[str, str, str]:
    """Of a cluster's URL: what a node's has before its host, the hosts, and what it has after."""
    scheme, _, rest = url.partition("+cluster://")
    credentials, at, rest = rest.rpartition("@")
    hosts, mark, options = rest.partition("?")
    return f"{scheme}://{credentials}{at}", hosts.partition("/")[0], f"{mark}{options}"


async def discover(settings: Settings) -> SlotMap:
    """The map, as the first node that answers knows it. Raises BrokerUnavailableError."""
    error: Exception = BrokerUnavailableError("no node is named")
    for url in dict.fromkeys([*_seen.get(settings.url, ()), *seeds(settings.url)]):
        try:
            async with asyncio.timeout(NODE_TIMEOUT_S):
                link = await connect(url, "ms:map")
                try:
                    found = read_map(settings.url, url, await link.ask("CLUSTER", "SLOTS"))
                finally:
                    link.close()
        except UNREACHABLE as e:
            error = e
        else:
            _seen[settings.url] = found.urls
            return found
    raise cannot_reach(settings, error) from error


def read_map(cluster_url: str, asked_url: str, rows: Iterable[Any]) -> SlotMap:
    """What CLUSTER SLOTS said. A node without a host is the one that was asked."""
    found = []
    for first, last, primary, *_ in rows:
        host = (primary[0] or b"").decode()
        if not host or host == "?":
            host = str(parse_url(asked_url).get("host", "localhost"))
        found.append(
            (first, last, with_node(cluster_url, f"[{host}]:{primary[1]}" if ":" in host else f"{host}:{primary[1]}"))
        )
    return SlotMap(tuple(sorted(found)))


async def dial(settings: Settings, name: str, on_message: Callable[[bytes], None] | None = None, *, near: str) -> Link:
    """A link to the server; in a cluster, to the node that has the key `near`. Raises BrokerUnavailableError."""
    if not settings.is_cluster:
        return await single.dial(settings, name, on_message)
    slots = await discover(settings)
    return await _to_node(settings, slots.url_of(near), name, on_message)


async def dial_everywhere(
    settings: Settings, name: str, on_message: Callable[[bytes], None] | None = None, *, near: str = ""
) -> Link:
    """A link that takes commands about any key; those about none go where `near` is. Raises BrokerUnavailableError."""
    if not settings.is_cluster:
        return await single.dial(settings, name, on_message)
    slots = await discover(settings)
    home = slots.url_of(near)
    links: dict[str, Link] = {}
    try:
        for url in slots.urls:
            links[url] = await _to_node(settings, url, name, on_message)
    except BaseException:
        for link in links.values():
            link.close()
        raise
    return ClusterLink(settings, slots, links, home)


async def _to_node(settings: Settings, url: str, name: str, on_message: Callable[[bytes], None] | None) -> Link:
    return await single.in_time(settings, lambda: connect(url, name, on_message))


class ClusterLink(Link):
    """A link to each primary, as one: a command goes to the node of its first key. Lost as soon as one of them is, and
    when another map is in force."""

    def __init__(self, settings: Settings, slots: SlotMap, links: dict[str, Link], home: str) -> None:
        super().__init__()
        self._settings, self._slots, self._links, self._home = settings, slots, links, links[home]
        self._by_tag: dict[str, Link] = {}
        self._is_ended = False
        self.client_id = self._home.client_id
        for link in links.values():
            link.lost.add_done_callback(self._one_is_lost)
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    @property
    def is_up(self) -> bool:
        return not self._is_ended and all(link.is_up for link in self._links.values())

    def send(self, callback: Callback, *command: Any) -> None:
        key = next((part for part in command[1:] if type(part) is str and part[:1] == "{"), "")
        (self._of(key) if key else self._home).send(callback, *command)

    def start(self, call: Call[T], callback: Callable[[T | Exception], None]) -> None:
        self._of(call.keys[0]).start(call, callback)

    def finish(self) -> None:
        self._end()
        for link in self._links.values():
            link.finish()

    def ends(self) -> list[asyncio.Future[None]]:
        return [link.lost for link in self._links.values()]

    def close(self) -> None:
        self._end()
        for link in self._links.values():
            link.close()

    def _of(self, key: str) -> Link:
        tag = key[: key.find("}") + 1] or key
        link = self._by_tag.get(tag)
        if link is None:
            link = self._by_tag[tag] = self._links[self._slots.url_of(key)]
        return link

    def _one_is_lost(self, _: asyncio.Future[None]) -> None:
        if not self.lost.done():
            self.lost.set_result(None)
        if not self._is_ended:
            self.close()

    def _end(self) -> None:
        self._is_ended = True
        self._watching.cancel()

    async def _watch(self) -> None:
        """End this link when the map that it was made by is not in force any more."""
        for url, link in _in_turn(self._links):
            await asyncio.sleep(WATCH_S)
            try:
                async with asyncio.timeout(NODE_TIMEOUT_S):
                    now = read_map(self._settings.url, url, await link.ask("CLUSTER", "SLOTS"))
            except UNREACHABLE:
                continue  # the next one will know
            if now != self._slots:
                self.close()
                return


def _in_turn(links: dict[str, Link]) -> Iterator[tuple[str, Link]]:
    while True:
        yield from links.items()
