"""Streams against lost messages, lost connections, lost servers and lost replicas: every item once, in order, or an error."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from millstream.broker import scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys, split_ref
from millstream.config import Settings
from millstream.errors import MillstreamError, RefNotFoundError, RequestCancelledError
from millstream.handles import engines, lines, patrol, stream_cell
from millstream.handles.engine import Engine
from millstream.handles.handle import DeploymentHandle
from millstream.handles.stream_cell import StreamCell
from millstream.replicas import orders, replica, streaming
from millstream.replicas.streaming import Emitters
from tests.handles.generators import Model, is_closed, left_behind, read_to_the_end
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Serving, cut, wires
from tests.servers import Server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("impatient")]

LOOPS = pytest.mark.parametrize(
    "anyio_backend", ["asyncio", ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"]
)
BOTH = pytest.mark.parametrize("method", ["count", "count_in_thread"])
MIXED = [10, 5000, 70_000, 100, 300_000] * 8


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What usually takes seconds takes fractions of one."""
    monkeypatch.setattr(lines, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(patrol, "LOOK_AFTER_S", 0.05)
    monkeypatch.setattr(replica, "HOUSEKEEPING_S", 0.05)
    monkeypatch.setattr(orders, "LOOK_AFTER_S", 0.05)


def keys_of(handle: DeploymentHandle) -> DeploymentKeys:
    return DeploymentKeys("ms", f"{handle.app_name}.{handle.deployment_name}")


async def read_slowly(stream: Any, disturb: Callable[[int], Any]) -> list[Any]:
    """All items; `disturb(n)` is awaited after the n-th."""
    items = []
    async for item in stream:
        items.append(item)
        await disturb(len(items))
    return items


# messages


@pytest.mark.parametrize("lose", [lambda number: True, lambda number: number % 3 == 0, lambda number: number == 0])
async def test_items_whose_messages_were_lost_are_read_from_the_record(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, lose: Callable[[int], bool]
) -> None:
    original, lost = StreamCell.item, []

    def item(self: StreamCell, stored: bytes) -> None:
        number = int(stored.partition(b"\n")[0][5:])
        if lose(number):
            lost.append(number)
        else:
            original(self, stored)

    monkeypatch.setattr(StreamCell, "item", item)

    read, error = await asyncio.wait_for(read_to_the_end(serving(Model).count.options(max_ahead=10).stream(45)), 20)

    assert (read, error) == (list(range(45)), None)
    assert lost


async def test_items_before_an_error_are_read_from_the_record_if_their_messages_were_lost(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StreamCell, "item", lambda self, stored: None)

    read, error = await asyncio.wait_for(read_to_the_end(serving(Model).fail_after.stream(20)), 10)

    assert read == list(range(20))
    assert isinstance(error, ValueError)


async def test_end_whose_message_was_lost_is_read_from_the_record(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Engine.on_message

    def on_message(self: Engine, message: bytes) -> None:
        if b"succeeded" not in message:
            original(self, message)

    monkeypatch.setattr(Engine, "on_message", on_message)

    read, error = await asyncio.wait_for(read_to_the_end(serving(Model).count.stream(5)), 10)

    assert (read, error) == (list(range(5)), None)


@BOTH
async def test_replica_finds_out_how_far_its_reader_is_if_no_order_says_so(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(Emitters, "was_read", lambda self, place, count: None)

    stream = getattr(serving(Model), method).options(max_ahead=10).stream(60)

    assert (await asyncio.wait_for(read_to_the_end(stream), 20))[0] == list(range(60))


async def test_reader_says_again_how_far_it_is_if_nobody_heard(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server never heard of it: the producer waits for the reader, and the reader for the producer."""
    original, calls = StreamCell._consumed, 0

    def consumed(self: StreamCell) -> None:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            original(self)

    monkeypatch.setattr(StreamCell, "_consumed", consumed)

    stream = serving(Model).count.options(max_ahead=4).stream(20)

    assert (await asyncio.wait_for(read_to_the_end(stream), 20))[0] == list(range(20))
    assert calls > 5


async def test_record_longer_than_one_look_is_read_to_its_end(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_cell, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(StreamCell, "item", lambda self, stored: None)

    stream = serving(Model).count.options(max_ahead=100).stream(50)

    assert (await asyncio.wait_for(read_to_the_end(stream), 10))[0] == list(range(50))


async def test_script_that_the_server_has_forgotten_is_no_reason_to_lose_items(
    serving: Serving, redis: Control
) -> None:
    """Items and result go out together: what is unknown to the server is sent again, and must not come too late."""
    handle = serving(Model)
    assert await handle.plain.call(1) == 1  # the server knows how requests are finished

    for _ in range(20):
        assert (await read_to_the_end(handle.count.stream(3)))[0] == [0, 1, 2]


async def test_reader_that_stood_still_and_was_cut_off_by_the_server_misses_nothing(
    serving: Serving, redis: Control
) -> None:
    """A subscriber that does not read is disconnected when too much waits for it."""
    handle = serving(Model)
    await redis.config_set("client-output-buffer-limit", "pubsub 100kb 0 0")
    try:
        stream = handle.blobs.options(max_ahead=1000).stream([4000] * 600)
        first = await anext(stream)
        time.sleep(1.0)  # noqa: ASYNC251 - the loop stands still
        read, error = await asyncio.wait_for(read_to_the_end(stream), 20)
    finally:
        await redis.config_set("client-output-buffer-limit", "pubsub 32mb 8mb 60")

    assert [item[:1] for item in [first, *read]] == [bytes([n % 256]) for n in range(600)]
    assert error is None


# connections


@LOOPS
@pytest.mark.parametrize("what", ["client", "replies", "bulk", "writes", "hears", "reads"])
async def test_loss_of_a_connection_loses_no_item(serving: Serving, redis: Control, what: str) -> None:
    handle = serving(Model)

    async def one_is_cut() -> bool:
        return await cut(redis, f"ms:{what}:") > 0

    async def disturb(count: int) -> None:
        if count in (5, 12, 30):
            await wait_until(one_is_cut)  # it may be on its way back from the last time
        elif count == 13:
            await one_is_cut()

    stream = handle.blobs.options(max_ahead=6).stream(MIXED)
    items = await asyncio.wait_for(read_slowly(stream, disturb), 30)

    assert [(len(item), item[:1]) for item in items] == [(s, bytes([n % 256])) for n, s in enumerate(MIXED)]
    assert [key for key in await left_behind(redis) if ":items:" in key] == []


@BOTH
async def test_loss_of_all_connections_again_and_again_loses_no_item(
    serving: Serving, redis: Control, method: str
) -> None:
    async def disturb(count: int) -> None:
        if count % 40 == 0:
            await cut(redis, "ms:client:", "ms:replies:", "ms:writes:", "ms:hears:", "ms:reads:")

    stream = getattr(serving(Model), method).options(max_ahead=10).stream(200)

    assert await asyncio.wait_for(read_slowly(stream, disturb), 30) == list(range(200))


async def test_stream_that_is_closed_during_an_outage_is_cancelled_after_it(serving: Serving, redis: Control) -> None:
    handle = serving(Model)
    stream = handle.count.stream(100_000)
    await anext(stream)

    await cut(redis, "ms:client:", "ms:replies:")
    await stream.aclose()

    await is_closed(handle)

    async def items_are_gone() -> bool:
        return not [key for key in await left_behind(redis) if ":items:" in key]

    await wait_until(items_are_gone)


# the server


@BOTH
async def test_restart_of_the_server_loses_no_item(start_server: Callable[..., Server], method: str) -> None:
    server = start_server("--appendonly", "yes", "--appendfsync", "always")
    engines.use(Settings(server.url, secret_key=b"a secret for tests"))
    serving = Serving(engines.settings())
    try:

        async def disturb(count: int) -> None:
            if count in (30, 100):
                server.kill()
                await asyncio.sleep(0.1)
                await asyncio.to_thread(server.start)

        stream = getattr(serving(Model), method).options(max_ahead=20).stream(150)
        assert await asyncio.wait_for(read_slowly(stream, disturb), 30) == list(range(150))
    finally:
        await asyncio.to_thread(serving.close)
        engines.close_all()


async def test_server_that_has_lost_its_data_ends_the_stream_in_an_error(
    start_server: Callable[..., Server],
) -> None:
    server = start_server()
    engines.use(Settings(server.url, secret_key=b"a secret for tests"))
    serving = Serving(engines.settings())
    gate = Gate()
    try:
        stream = serving(Model, gate).first_then_held.stream()
        assert await anext(stream) == "first"

        server.kill()
        await asyncio.to_thread(server.start)

        with pytest.raises(RefNotFoundError):
            await asyncio.wait_for(anext(stream), 20)
        gate.open()
    finally:
        await asyncio.to_thread(serving.close)
        engines.close_all()


async def test_items_that_are_gone_from_the_server_are_an_error_and_no_hang(
    serving: Serving, redis: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evicted, or lost in a restart; and the messages that brought them as well."""
    monkeypatch.setattr(StreamCell, "item", lambda self, stored: None)
    monkeypatch.setattr(StreamCell, "look_again", lambda self: False)
    handle = serving(Model)
    stream = handle.count.options(max_ahead=5).stream(100)
    reading = asyncio.create_task(read_to_the_end(stream))
    keys, (_, ref) = keys_of(handle), split_ref(stream.ref_id)

    async def is_full() -> bool:
        return bool(await redis.xlen(keys.items(ref)) == 5)

    await wait_until(is_full)
    await redis.xdel(keys.items(ref), "1-1", "2-1")
    monkeypatch.undo()
    monkeypatch.setattr(patrol, "LOOK_AFTER_S", 0.05)

    read, error = await asyncio.wait_for(reading, 10)

    assert read == []
    assert isinstance(error, RefNotFoundError) and "item 0 of stream" in str(error)
    await is_closed(handle)


async def test_record_that_may_not_be_read_is_an_error_and_no_hang(serving: Serving, redis: Control) -> None:
    handle = serving(Model)
    assert await handle.plain.call(1) == 1
    await redis.acl_setuser("default", enabled=True, nopass=True, commands=["+@all", "-xrange"])
    try:
        read, error = await asyncio.wait_for(read_to_the_end(handle.blobs.stream([10, 5000])), 10)
    finally:
        await redis.acl_setuser("default", enabled=True, nopass=True, commands=["+@all"])

    assert len(read) <= 1
    assert error is not None and "NOPERM" in str(error)


async def test_large_item_that_is_gone_is_an_error_in_its_place(serving: Serving, redis: Control) -> None:
    handle = serving(Model)
    stream = handle.blobs.stream([100_000] * 4)
    keys, (_, ref) = keys_of(handle), split_ref(stream.ref_id)
    assert len(await anext(stream)) == 100_000

    async def all_are_there() -> bool:
        return len([key for key in await left_behind(redis) if f":value:{ref}:" in key]) == 4

    await wait_until(all_are_there)
    async for key in redis.scan_iter(f"{keys.value_prefix}{ref}:1.*"):
        await redis.delete(key)

    with pytest.raises(RefNotFoundError, match="item 1 of its stream has expired"):
        await anext(stream)
    assert [item[:1] async for item in stream] == [b"\2", b"\3"]


async def test_item_that_was_tampered_with_is_refused(
    serving: Serving, redis: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = serving(Model)
    monkeypatch.setattr(StreamCell, "item", lambda self, stored: None)
    monkeypatch.setattr(StreamCell, "look_again", lambda self: False)
    stream = handle.count.options(max_ahead=2).stream(2)
    keys, (_, ref) = keys_of(handle), split_ref(stream.ref_id)

    async def both_are_there() -> bool:
        return bool(await redis.xlen(keys.items(ref)) == 2)

    await wait_until(both_are_there)
    rows: Any = await redis.xrange(keys.items(ref))
    await redis.delete(keys.items(ref))
    await redis.xadd(keys.items(ref), {"item": rows[1][1][b"item"]}, id="1-1")  # moved to another place
    await redis.xadd(keys.items(ref), {"item": rows[1][1][b"item"]}, id="2-1")
    await redis.expire(keys.items(ref), 60)
    monkeypatch.undo()
    monkeypatch.setattr(patrol, "LOOK_AFTER_S", 0.05)

    with pytest.raises(MillstreamError, match="does not bear this installation's signature"):
        await asyncio.wait_for(anext(stream), 10)
    assert await anext(stream) == 1


# replicas


class Ledger:
    """Says which replica made an item."""

    def __init__(self, made: list[tuple[int, int]], gates: list[Gate]) -> None:
        self._made, self._gates = made, gates

    async def count(self, n: int) -> AsyncIterator[Any]:
        attempt = len([one for one in self._made if one[1] == 0]) + 1
        for number in range(n):
            self._made.append((attempt, number))
            yield number if number % 5 else bytes([number]) * 100_000
            if number == n // 2:
                await self._gates[min(attempt, len(self._gates)) - 1].wait()


async def take_over(redis: Control, handle: DeploymentHandle) -> None:
    """As if the replica that runs the request had died, and it had not: its request goes to the other one."""
    keys = keys_of(handle)
    consumers: Any = await redis.xinfo_consumers(keys.lane("normal"), "replicas")
    (holder,) = [row["name"].decode() for row in consumers if row["pending"]]
    await run(redis, scripts.release(keys, "normal", holder, "died", expired=False))


@pytest.mark.parametrize("max_ahead", [4, 64])
async def test_next_attempt_repeats_nothing_that_the_reader_has(
    serving: Serving, redis: Control, max_ahead: int
) -> None:
    made: list[tuple[int, int]] = []
    gates = [Gate(), Gate()]
    handle = serving(Ledger, made, gates, replicas=2)
    gates[1].open()
    stream = handle.count.options(max_ahead=max_ahead).stream(30)
    read = [await anext(stream) for _ in range(10)]
    if max_ahead > 30:
        await wait_until(lambda: gates[0].inside == 1)

    await take_over(redis, handle)
    rest, error = await asyncio.wait_for(read_to_the_end(stream), 20)
    gates[0].open()

    numbers = [item if isinstance(item, int) else item[0] for item in [*read, *rest]]
    assert (numbers, error) == (list(range(30)), None)
    assert {attempt for attempt, _ in made} == {1, 2}


async def test_stream_whose_attempts_are_used_up_ends_in_that_error_after_its_items(
    serving: Serving, redis: Control
) -> None:
    gates = [Gate()]
    handle = serving(Ledger, [], gates, max_attempts=1)
    stream = handle.count.stream(30)
    await wait_until(lambda: gates[0].inside == 1)

    await take_over(redis, handle)
    read, error = await asyncio.wait_for(read_to_the_end(stream), 20)
    gates[0].open()

    assert len(read) == 16
    assert isinstance(error, MillstreamError) and "the last one it had" in str(error)


async def test_drained_replica_hands_its_stream_on_when_its_time_is_up(serving: Serving, redis: Control) -> None:
    """A slow reader cannot hold up a redeploy for ever."""
    made: list[tuple[int, int]] = []
    gate = Gate()
    gate.open()
    handle = serving(Ledger, made, [gate], graceful_shutdown_timeout_s=0.3)
    stream = handle.count.options(max_ahead=4).stream(30)
    read = [await anext(stream)]

    await asyncio.to_thread(serving.drain)
    await asyncio.to_thread(serving.start_replica, handle, Ledger, made, [gate])
    await take_over(redis, handle)  # as its launcher does
    rest, error = await asyncio.wait_for(read_to_the_end(stream), 20)

    numbers = [item if isinstance(item, int) else item[0] for item in [*read, *rest]]
    assert (numbers, error) == (list(range(30)), None)


async def test_reader_whose_stream_was_given_up_hears_why(
    serving: Serving, redis: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "READER_GONE_S", 0.1)
    handle = serving(Model)
    stream = handle.count.options(max_ahead=2).stream(100)
    await anext(stream)

    async def is_given_up() -> bool:
        return not await redis.hlen(keys_of(handle).open)

    with monkeypatch.context() as deaf:
        for wire in wires(engines.current().lines.replies):
            assert wire._transport is not None
            deaf.setattr(wire, "close", lambda: None)  # else it would notice, and end
            wire._transport.write(b"SUNSUBSCRIBE\r\n")
        await wait_until(is_given_up)
    read, error = await asyncio.wait_for(read_to_the_end(stream), 10)

    assert isinstance(error, RequestCancelledError) and "was not connected for 30 s" in str(error)
    assert read == list(range(1, 1 + len(read)))
