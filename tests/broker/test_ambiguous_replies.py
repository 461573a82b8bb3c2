"""Every verb with its connection cut, within the request and within the reply, and then sent again as its caller does:
what is in the server is as if nothing had happened, and nothing was added twice.

It is cut where a part of a message ends, just before, and in the middle of the end; with MILLSTREAM_CUT_POINTS=all, after
every byte (`make cuts`).
"""

import asyncio
import inspect
import os
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import hiredis
import pytest
from hiredis import pack_command

from millstream.broker import control_scripts, scripts
from millstream.broker.call import Call
from millstream.broker.connection import Control, open_control, run
from millstream.broker.keys import GROUP, DeploymentKeys
from millstream.broker.link import Link
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError
from tests.broker.verbs import SAME_ANSWER, VERBS, Seed
from tests.helpers import REPLICA, claim, deploy_config, read_everything, seed_queued, wait_until
from tests.leaks import NO_TTL, find_lost, take_snapshot
from tests.proxy import Limits, Proxy
from tests.servers import Server

pytestmark = [pytest.mark.anyio, pytest.mark.any_server, pytest.mark.single_server]  # behind a proxy

EVERY_BYTE = os.environ.get("MILLSTREAM_CUT_POINTS") == "all"
SOME = 6  # where a cut costs more
AT_ONCE = 50  # connections
SLOW = [(1, 0.0005)] if EVERY_BYTE else [(64, 0.005), (1, 0)]  # bytes at a time, seconds before each
REF = r"\b0{10}\d{12}"
PRINT = """
local names, seen = redis.call("KEYS", "*"), {}
table.sort(names)
for _, name in ipairs(names) do
  seen[#seen + 1] = name .. redis.call("DUMP", name) .. redis.call("PEXPIRETIME", name)
end
return redis.sha1hex(table.concat(seen))
"""


def test_every_verb_is_tried() -> None:
    modules = [scripts, control_scripts]
    names = {name for module in modules for name in re.findall(r'script\("(\w+)"\)', inspect.getsource(module))}

    assert names - {"claim"} <= {name.replace("emit_items", "emit") for name in VERBS}


class Bench:
    """A server behind a proxy, and one verb after the other."""

    def __init__(self, proxy: Proxy, redis: Control, blocking: Any, keys: DeploymentKeys) -> None:
        self.proxy, self.redis, self.keys, self._blocking = proxy, redis, keys, blocking
        self._others: set[str] = set()

    async def open(self) -> None:
        """Nobody has come through the proxy yet."""
        await asyncio.to_thread(self._blocking.ping)
        self._others = {client["id"] for client in await self.redis.client_list()}

    async def prepare(self, seed: Seed) -> Call[Any]:
        await self.redis.flushall()
        await deploy_config(self.redis, self.keys)
        return await seed(self.redis, self.keys)

    async def connect(self) -> Link:
        """A new connection, over which nothing was said yet."""
        _, link = await asyncio.get_running_loop().create_connection(Link, "127.0.0.1", self.proxy.port)
        return link

    async def run(self, call: Call[Any], *, with_source: bool = True) -> str:
        """Over a connection that lasts; what is answered."""
        link = await self.connect()
        answer = await link.ask(*(call.full_command() if with_source else call.command()))
        link.close()
        return normal(call.read(answer))

    async def undisturbed(self, seed: Seed) -> tuple[str, str]:
        """What a verb answers and leaves behind."""
        return await self.run(await self.prepare(seed)), await self.outcome()

    async def listen(self, call: Call[Any]) -> bytes:
        """Carry a verb out; the bytes of the reply."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.proxy.port)
        writer.write(pack_command(call.full_command()))
        parser, heard = hiredis.Reader(), b""
        while parser.gets() is False:
            heard += (more := await reader.read(1))
            parser.feed(more)
        writer.close()
        return heard

    async def lose(self, command: Sequence[Any], *fates: Limits) -> None:
        """Send a command into connections that will be cut: into as many at the same time as there are fates."""
        left = [*fates]
        self.proxy.cut_each(lambda: left.pop() if left else Limits())
        await asyncio.gather(*[self._send_and_lose(command) for _ in fates])
        assert not left
        await wait_until(self._is_alone, what="the server to have seen the end of each connection")

    async def _send_and_lose(self, command: Sequence[Any]) -> None:
        link = await self.connect()
        with pytest.raises(BrokerUnavailableError):
            await asyncio.wait_for(link.ask(*command), 60)

    async def _is_alone(self) -> bool:
        return {client["id"] for client in await self.redis.client_list()} <= self._others

    async def fingerprint(self) -> Any:
        """Of all that there is, bit by bit: pending lists, what was ever added, and the time when it ends."""
        return await self.redis.eval(PRINT, 0)

    async def outcome(self) -> str:
        """All that is there, whether it has a TTL, and how much was ever added. Fails if that contradicts itself."""
        snapshot = await asyncio.to_thread(take_snapshot, self._blocking)
        assert find_lost(snapshot) == []
        lives = {name: ttl_ms != NO_TTL for name, ttl_ms in snapshot.ttls_ms.items()}
        return normal(await read_everything(self.redis), lives, await self._added())

    async def _added(self) -> dict[str, int]:
        """Entries that a stream ever had: what was added and deleted counts, too."""
        streams = sorted([name.decode() async for name in self.redis.scan_iter(_type="stream")])
        return {name: (await self.redis.xinfo_stream(name))["entries-added"] for name in streams}


@pytest.fixture
async def bench(server: Server, redis: Control, keys: DeploymentKeys) -> AsyncIterator[Bench]:
    with Proxy(server.url) as proxy, server.connect_blocking() as blocking:
        bench = Bench(proxy, redis, blocking, keys)
        await bench.open()
        yield bench
    await redis.flushall()


def in_order(reading: Any) -> Any:
    """The order of a hash is not up to us."""
    return [(key, in_order(reading[key])) for key in sorted(reading)] if isinstance(reading, dict) else reading


def normal(*readings: Any) -> str:
    """Without what differs from one time to the next: refs by their order, entry ids and times not at all."""
    text = repr([in_order(one) for one in readings])
    refs = {ref: f"ref-{number}" for number, ref in enumerate(sorted(set(re.findall(REF, text))))}
    text = re.sub(REF, lambda match: refs[match[0]], text)
    return re.sub(r"(?<!\d)\d{13}(\.0)?(?!\d)", "time", re.sub(r"\b\d{13}-\d+", "entry", text))


def points(message: bytes) -> list[int]:
    """After how many of its bytes a message is cut."""
    if EVERY_BYTE:
        return [*range(len(message))]
    ends = [found.start() for found in re.finditer(rb"\r\n", message)]
    return sorted({0, 1, len(message) - 1, *(end + more for end in ends for more in (0, 1, 2))} - {len(message)})


def some(points: list[int]) -> list[int]:
    """The first, the last, and some between them."""
    if EVERY_BYTE or len(points) <= SOME:
        return points
    return [points[round(number * (len(points) - 1) / (SOME - 1))] for number in range(SOME)]


@pytest.mark.parametrize("name", VERBS)
async def test_verb_that_is_cut_off_before_its_end_changes_nothing(bench: Bench, name: str) -> None:
    expected = await bench.undisturbed(VERBS[name])
    call = await bench.prepare(VERBS[name])
    before = await bench.fingerprint()

    short, full = call.command(), call.full_command()
    for command, cuts in (short, points(pack_command(short))), (full, some(points(pack_command(full)))):
        for first in range(0, len(cuts), AT_ONCE):
            part = cuts[first : first + AT_ONCE]
            await bench.lose(command, *[Limits(sent=after) for after in part])
            assert await bench.fingerprint() == before, f"{name}: {command[0]} cut after so many bytes: {part}"

    assert (await bench.run(call), await bench.outcome()) == expected


@pytest.mark.parametrize("name", VERBS)
async def test_verb_whose_reply_is_cut_off_and_that_is_sent_again_is_as_one_that_was_not(
    bench: Bench, name: str
) -> None:
    answer, expected = await bench.undisturbed(VERBS[name])
    reply = await bench.listen(await bench.prepare(VERBS[name]))

    for after in some(points(reply)):
        call = await bench.prepare(VERBS[name])
        await bench.lose(call.command(), Limits(received=after))
        again = await bench.run(call)
        where = f"{name}: cut after {after} bytes of {reply!r}"
        assert await bench.outcome() == expected, where
        assert again == answer or name not in SAME_ANSWER, where

    call = await bench.prepare(VERBS[name])
    async with open_control(Settings(bench.proxy.url), "through") as client:  # which sends again of itself
        await client.ping()
        bench.proxy.drop_reply()
        await run(client, call)
    assert bench.proxy.cuts == len(some(points(reply))) + 1
    assert await bench.outcome() == expected, f"{name}, with redis-py"


@pytest.mark.parametrize("name", VERBS)
async def test_verb_that_comes_late_and_byte_by_byte_is_as_one_that_came_at_once(bench: Bench, name: str) -> None:
    expected = await bench.undisturbed(VERBS[name])

    for piece, delay_s in SLOW:
        call = await bench.prepare(VERBS[name])
        bench.proxy.piece, bench.proxy.delay_s = piece, delay_s
        answer = await bench.run(call, with_source=EVERY_BYTE)
        assert (answer, await bench.outcome()) == expected, f"{name}, {piece} bytes every {delay_s} s"


async def test_what_a_claim_brought_into_a_cut_connection_is_in_the_pending_list_and_nothing_else_is(
    bench: Bench, redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    call = scripts.claim(keys, REPLICA, 1)
    refs = await seed_queued(redis, keys, 1000)
    cuts = some(points(await bench.listen(call)))

    for number, after in enumerate(cuts, start=2):
        await bench.lose(call.command(), Limits(received=after))
        link = await bench.connect()  # and look for what has come, as a replica does (Intake.reconcile)
        heard = await link.ask("XREADGROUP", "GROUP", GROUP, REPLICA, "STREAMS", keys.lane("normal"), "0")
        held = [fields[fields.index(b"ref") + 1].decode() for _, entries in heard for _, fields in entries]
        link.close()
        assert held == refs[:number], f"cut after {after} bytes"

    assert [one.ref for one in await claim(redis, keys, 1000, replica="r-2")] == refs[len(cuts) + 1 :]
