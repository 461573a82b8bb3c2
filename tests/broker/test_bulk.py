"""Large values on real servers: in pieces, all or nothing, over connections that may be lost at any moment."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from millstream.broker import bulk as bulk_module
from millstream.broker.bulk import IN_A_THREAD_BYTES, MOST_CONNECTIONS, PIECE_BYTES, UNDER_WAY, Bulk
from millstream.broker.codec import Opening, Sealing, codec_for
from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys
from millstream.broker.pickling import Pickled
from millstream.config import Settings
from millstream.errors import BackPressureError, BrokerUnavailableError, SignatureError
from tests.broker.raw import Raw
from tests.helpers import wait_until
from tests.replica_helpers import connections, cut
from tests.servers import free_port

pytestmark = pytest.mark.anyio

TTL_MS = 60_000
PREFIX = "ms:bulk:test-bulk"


@pytest.fixture
async def bulk(settings: Settings) -> AsyncIterator[Bulk]:
    bulk = Bulk(settings, "test-bulk", patience_s=5.0)
    yield bulk
    bulk.close()


@pytest.fixture
def key(keys: DeploymentKeys) -> str:
    return keys.value("r" * 22, "1-1")


def random_bytes(size: int) -> bytes:
    return os.urandom(size)


async def read(bulk: Bulk, key: str, size: int) -> bytes | None:
    value = await bulk.read(key, size, Raw)
    return None if value is None else bytes(value)


async def unfinished(redis: Control, keys: DeploymentKeys) -> list[bytes]:
    return [name async for name in redis.scan_iter(f"{keys.prefix}arriving:*")]


# whole values


@pytest.mark.parametrize(
    "size", [1, 65_537, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 7 * PIECE_BYTES, 40 * PIECE_BYTES + 123]
)
async def test_value_of_any_size_comes_back(bulk: Bulk, keys: DeploymentKeys, key: str, size: int) -> None:
    value = random_bytes(size)

    assert await bulk.write(keys, key, Raw(value), TTL_MS)

    assert await read(bulk, key, size) == value


async def test_parts_are_stored_one_after_the_other(bulk: Bulk, keys: DeploymentKeys, key: str) -> None:
    parts = [random_bytes(size) for size in (18, 0, 70_000, PIECE_BYTES, 3 * PIECE_BYTES + 5, 1)]

    await bulk.write(keys, key, Raw(parts[0], *(memoryview(part) for part in parts[1:])), TTL_MS)

    assert await read(bulk, key, sum(map(len, parts))) == b"".join(parts)


async def test_value_lies_there_in_pieces_that_hold_nobody_up(
    redis: Control, bulk: Bulk, keys: DeploymentKeys, key: str
) -> None:
    await bulk.write(keys, key, Raw(bytes(3 * PIECE_BYTES + 7)), TTL_MS)

    pieces: Any = await redis.lrange(key, 0, -1)

    assert [len(piece) for piece in pieces] == [PIECE_BYTES] * 3 + [7]


async def test_pieces_of_another_size_are_read_as_well(redis: Control, bulk: Bulk, key: str) -> None:
    pieces = [random_bytes(size) for size in (10, 2 * PIECE_BYTES, 1, 70_000)]
    await redis.rpush(key, *pieces)
    await redis.expire(key, 60)

    assert await read(bulk, key, sum(map(len, pieces))) == b"".join(pieces)


async def test_what_was_read_may_be_written_to(bulk: Bulk, keys: DeploymentKeys, key: str) -> None:
    for size in (1000, 3 * PIECE_BYTES):
        await bulk.write(keys, key, Raw(bytes(size)), TTL_MS)

        value = await bulk.read(key, size, Raw)

        assert value is not None
        value[size - 1] = 7
        assert value[size - 1] == 7


async def test_value_ends_with_its_ttl(redis: Control, bulk: Bulk, keys: DeploymentKeys, key: str) -> None:
    await bulk.write(keys, key, Raw(bytes(70_000)), TTL_MS)

    assert TTL_MS - 10_000 < await redis.pttl(key) <= TTL_MS
    assert await unfinished(redis, keys) == []


async def test_value_is_replaced_by_a_later_one(bulk: Bulk, keys: DeploymentKeys, key: str) -> None:
    await bulk.write(keys, key, Raw(b"a" * 100_000), TTL_MS)

    assert await bulk.write(keys, key, Raw(b"b" * 80_000), TTL_MS)

    assert await read(bulk, key, 80_000) == b"b" * 80_000


async def test_value_that_is_there_stays_if_only_a_new_one_is_wanted(
    redis: Control, bulk: Bulk, keys: DeploymentKeys, key: str
) -> None:
    assert await bulk.write(keys, key, Raw(b"a" * 100_000), TTL_MS, only_new=True)
    await redis.persist(key)

    assert not await bulk.write(keys, key, Raw(b"b" * 80_000), TTL_MS, only_new=True)

    assert await read(bulk, key, 100_000) == b"a" * 100_000
    assert await redis.pttl(key) == -1
    assert await unfinished(redis, keys) == []
    await redis.delete(key)


# what is not there


async def test_nothing_is_read_of_a_value_that_is_gone(bulk: Bulk, key: str) -> None:
    assert await read(bulk, key, 100_000) is None
    assert await read(bulk, key, 20 * PIECE_BYTES) is None


async def test_nothing_is_read_of_a_value_that_is_shorter_or_longer_than_it_should_be(
    bulk: Bulk, keys: DeploymentKeys, key: str
) -> None:
    await bulk.write(keys, key, Raw(bytes(3 * PIECE_BYTES)), TTL_MS)

    assert await read(bulk, key, 3 * PIECE_BYTES + 1) is None
    assert await read(bulk, key, 3 * PIECE_BYTES - 1) is None
    assert await read(bulk, key, 3 * PIECE_BYTES) is not None


async def test_value_that_is_deleted_while_it_is_read_is_gone(
    redis: Control, bulk: Bulk, keys: DeploymentKeys, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bulk.write(keys, key, Raw(bytes(20 * PIECE_BYTES)), TTL_MS)
    fill = bulk_module._Wire.fill

    async def fill_and_delete(self: Any, target: memoryview) -> None:
        await fill(self, target)
        await redis.delete(key)

    monkeypatch.setattr(bulk_module._Wire, "fill", fill_and_delete)

    assert await read(bulk, key, 20 * PIECE_BYTES) is None


async def test_key_of_another_type_is_an_error_and_no_hang(redis: Control, bulk: Bulk, key: str) -> None:
    await redis.set(key, "not a list", ex=60)

    with pytest.raises(Exception, match="WRONGTYPE"):
        await bulk.read(key, 100, Raw)


# connections


async def test_connection_is_used_again(redis: Control, bulk: Bulk, keys: DeploymentKeys, key: str) -> None:
    for _ in range(5):
        await bulk.write(keys, key, Raw(bytes(100_000)), TTL_MS)
        await bulk.read(key, 100_000, Raw)

    assert len(await connections(redis, PREFIX)) == 1


async def test_several_values_travel_at_once_over_a_few_connections(
    redis: Control, bulk: Bulk, keys: DeploymentKeys
) -> None:
    values = {keys.value(f"{n:022d}", "1-1"): random_bytes(200_000 + n) for n in range(20)}

    await asyncio.gather(*[bulk.write(keys, key, Raw(value), TTL_MS) for key, value in values.items()])
    found = await asyncio.gather(*[read(bulk, key, len(value)) for key, value in values.items()])

    assert found == list(values.values())
    assert 1 <= len(await connections(redis, PREFIX)) <= MOST_CONNECTIONS


async def test_connection_that_was_lost_while_idle_is_replaced(
    redis: Control, bulk: Bulk, keys: DeploymentKeys, key: str
) -> None:
    await bulk.write(keys, key, Raw(bytes(100_000)), TTL_MS)
    await cut(redis, PREFIX)

    assert await read(bulk, key, 100_000) == bytes(100_000)


async def test_value_is_sent_again_when_its_connection_is_lost_half_way(
    redis: Control, bulk: Bulk, keys: DeploymentKeys, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    value, cuts = random_bytes(20 * PIECE_BYTES), await cut_at(redis, monkeypatch, "line", 10, 25)

    assert await bulk.write(keys, key, Raw(value), TTL_MS)

    assert cuts == []
    assert await read(bulk, key, len(value)) == value
    for left in await unfinished(redis, keys):
        assert 0 < await redis.pttl(left) <= bulk_module.UNFINISHED_TTL_MS


async def test_value_is_read_again_when_its_connection_is_lost_half_way(
    redis: Control, bulk: Bulk, keys: DeploymentKeys, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = random_bytes(20 * PIECE_BYTES)
    await bulk.write(keys, key, Raw(value), TTL_MS)
    cuts = await cut_at(redis, monkeypatch, "fill", 3, 9)

    assert await read(bulk, key, len(value)) == value

    assert cuts == []


async def cut_at(redis: Control, monkeypatch: pytest.MonkeyPatch, method: str, *calls: int) -> list[int]:
    """Have the server cut the connection before these calls of a method of the wire; what is left of them."""
    original, left, count = getattr(bulk_module._Wire, method), list(calls), 0

    async def counted(self: Any, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if left and count == left[0]:
            left.pop(0)
            await cut(redis, PREFIX)
        return await original(self, *arguments)

    monkeypatch.setattr(bulk_module._Wire, method, counted)
    return left


async def test_connection_that_is_lost_under_every_try_is_an_error_in_the_end(
    redis: Control, settings: Settings, keys: DeploymentKeys, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bulk = Bulk(settings, "test-bulk", patience_s=None)
    monkeypatch.setattr(bulk_module, "backoff", lambda: iter([0.001] * 100))
    await cut_at(redis, monkeypatch, "line", *range(1, 1000))

    with pytest.raises(BrokerUnavailableError, match="with a large value on its way"):
        await bulk.write(keys, key, Raw(bytes(100_000)), TTL_MS)

    bulk.close()
    assert not await redis.exists(key)


async def test_write_that_is_cancelled_leaves_nothing_under_the_key(
    redis: Control, bulk: Bulk, keys: DeploymentKeys, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    halfway = asyncio.Event()
    line = bulk_module._Wire.line

    async def stop_halfway(self: Any) -> bytes:
        if await unfinished(redis, keys):
            halfway.set()
            await asyncio.sleep(60)
        return await line(self)

    monkeypatch.setattr(bulk_module._Wire, "line", stop_halfway)
    writing = asyncio.create_task(bulk.write(keys, key, Raw(bytes(20 * PIECE_BYTES)), TTL_MS))
    await halfway.wait()

    writing.cancel()
    await asyncio.wait([writing])
    monkeypatch.undo()

    async def is_hung_up() -> bool:
        return not await connections(redis, PREFIX)

    await wait_until(is_hung_up)
    assert not await redis.exists(key)
    for left in await unfinished(redis, keys):
        assert 0 < await redis.pttl(left) <= bulk_module.UNFINISHED_TTL_MS
    assert await bulk.write(keys, key, Raw(bytes(100_000)), TTL_MS)


async def test_what_has_arrived_never_lacks_a_ttl(
    redis: Control, bulk: Bulk, keys: DeploymentKeys, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever dies at any moment leaves nothing for ever. Each step of the writer is one such moment."""
    seen, send = [], bulk_module._Wire.send

    async def send_and_look(self: Any, *pieces: Any) -> None:
        await send(self, *pieces)
        await asyncio.sleep(0.002)
        seen.extend([await redis.pttl(name) for name in [*await unfinished(redis, keys), key.encode()]])

    monkeypatch.setattr(bulk_module._Wire, "send", send_and_look)

    await bulk.write(keys, key, Raw(bytes(4 * PIECE_BYTES)), TTL_MS)

    assert -1 not in seen
    assert any(ttl_ms > 0 for ttl_ms in seen)


async def test_pieces_that_expired_meanwhile_are_not_taken_for_the_value(
    redis: Control, bulk: Bulk, keys: DeploymentKeys, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that stood still for longer than they are kept starts again."""
    value, line = random_bytes(20 * PIECE_BYTES), bulk_module._Wire.line
    expired: list[bytes] = []

    async def expire_once(self: Any) -> bytes:
        if not expired and (names := await unfinished(redis, keys)):
            expired.extend(names)
            await redis.delete(*names)
        return await line(self)

    monkeypatch.setattr(bulk_module._Wire, "line", expire_once)

    await bulk.write(keys, key, Raw(value), TTL_MS)

    assert len(expired) == 1
    assert await read(bulk, key, len(value)) == value


async def test_server_that_cannot_be_reached_is_an_error_after_a_while(keys: DeploymentKeys, key: str) -> None:
    bulk = Bulk(Settings(f"redis://127.0.0.1:{free_port()}"), "test-bulk", patience_s=0.1)

    with pytest.raises(BrokerUnavailableError, match="is it running"):
        await bulk.read(key, 1000, Raw)


async def test_after_close_there_is_an_error_and_no_new_connection(
    redis: Control, bulk: Bulk, keys: DeploymentKeys, key: str
) -> None:
    await bulk.write(keys, key, Raw(bytes(100_000)), TTL_MS)

    bulk.close()

    with pytest.raises(BrokerUnavailableError, match="closed"):
        await bulk.read(key, 100_000, Raw)

    async def is_hung_up() -> bool:
        return not await connections(redis, PREFIX)

    await wait_until(is_hung_up)


async def test_full_server_is_said_to_be_full(redis: Control, bulk: Bulk, keys: DeploymentKeys, key: str) -> None:
    await redis.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(BackPressureError, match="raise its maxmemory"):
            await bulk.write(keys, key, Raw(bytes(20 * PIECE_BYTES)), TTL_MS)
    finally:
        await redis.config_set("maxmemory", "0")

    assert not await redis.exists(key)
    assert await bulk.write(keys, key, Raw(bytes(100_000)), TTL_MS)


async def test_small_commands_are_answered_while_a_large_value_travels(
    redis: Control, bulk: Bulk, keys: DeploymentKeys, key: str
) -> None:
    size = 64 * 1024 * 1024
    waits_s: list[float] = []
    clock, is_over = asyncio.get_running_loop().time, asyncio.Event()

    async def ping() -> None:
        while not is_over.is_set():  # redis-py may swallow a cancel
            started = clock()
            await redis.ping()
            waits_s.append(clock() - started)
            await asyncio.sleep(0.001)

    async with asyncio.TaskGroup() as group:
        group.create_task(ping())
        await bulk.write(keys, key, Raw(bytes(size)), TTL_MS)
        await bulk.read(key, size, Raw)
        is_over.set()

    assert len(waits_s) > 10
    assert sorted(waits_s)[len(waits_s) * 9 // 10] < 0.1  # in one piece: as long as all of it takes


# what takes long


SECRET = b"a secret for tests"
REF = b"r" * 22


def sealing_of(value: bytes) -> Sealing:
    return codec_for(SECRET, "ms", "app.Model").sealing("value", REF, Pickled(b"", [memoryview(value)]))


def opening(ref: bytes = REF) -> Opening:
    return codec_for(SECRET, "ms", "app.Model").opening("value", ref)


class Watched(Opening):
    """Notes in which threads it worked, and on how much at a time."""

    def __init__(self) -> None:
        super().__init__(codec_for(SECRET, "ms", "app.Model"), "value", REF, b"")
        self.work: list[tuple[int, int]] = []

    def update(self, data: memoryview) -> None:
        self.work.append((threading.get_ident(), len(data)))
        super().update(data)


@pytest.mark.parametrize("size", [1, 70_000, IN_A_THREAD_BYTES - 100, IN_A_THREAD_BYTES + 1, 3_000_000, 20_000_001])
async def test_envelope_of_any_size_comes_back_and_is_verified(
    bulk: Bulk, keys: DeploymentKeys, key: str, size: int
) -> None:
    value = random_bytes(size)
    sealing = sealing_of(value)

    assert await bulk.write(keys, key, sealing, TTL_MS)
    verified = await bulk.read(key, sealing.size_bytes, opening)

    assert verified is not None and bytes(verified.body[-size:]) == value
    assert await read(bulk, key, sealing.size_bytes) == b"".join([sealing.sign(), *sealing.parts])


async def test_what_is_small_is_verified_at_once_and_what_is_large_in_a_thread_while_it_comes(
    bulk: Bulk, keys: DeploymentKeys, key: str
) -> None:
    small, large = Watched(), Watched()
    for size, watched in ((100_000, small), (20_000_000, large)):
        sealing = sealing_of(bytes(size))
        await bulk.write(keys, key, sealing, TTL_MS)
        assert await bulk.read(key, sealing.size_bytes, lambda watched=watched: watched)  # type: ignore[misc]
        assert sum(length for _, length in watched.work) == sealing.size_bytes

    assert [thread for thread, _ in small.work] == [threading.get_ident()]
    assert len(large.work) > 1
    assert threading.get_ident() not in {thread for thread, length in large.work if length > IN_A_THREAD_BYTES}


@pytest.mark.parametrize("size", [100_000, 20_000_000])
async def test_envelope_that_was_changed_or_is_of_another_ref_is_refused(
    redis: Control, bulk: Bulk, keys: DeploymentKeys, key: str, size: int
) -> None:
    sealing = sealing_of(bytes(size))
    await bulk.write(keys, key, sealing, TTL_MS)

    with pytest.raises(SignatureError, match="signature"):
        await bulk.read(key, sealing.size_bytes, lambda: opening(b"s" * 22))
    for number, changed in ((0, b"\x02"), (-1, b"\x01")):
        piece: Any = await redis.lindex(key, number)
        await redis.lset(key, number, piece[:-1] + changed if number else changed + piece[1:])
        with pytest.raises(SignatureError):
            await bulk.read(key, sealing.size_bytes, opening)
        await redis.lset(key, number, piece)
    assert await bulk.read(key, sealing.size_bytes, opening)


async def test_all_is_verified_though_the_thread_is_done_in_the_moment_that_the_last_of_it_comes() -> None:
    fed: list[bytes] = []
    following = bulk_module._Following(lambda data: fed.append(bytes(data)), memoryview(b"123"))
    for arrived in (1, 2, 3):
        following._arrived, following._feeding = arrived, asyncio.get_running_loop().create_future()
        following._feeding.add_done_callback(following._go_on)
        following._update(following._next())
        following._feeding.set_result(None)
        await asyncio.wait_for(following.finish(), 5)

    assert fed == [b"1", b"", b"2", b"", b"3", b""]


async def test_envelope_that_is_gone_or_of_another_size_is_not_read(bulk: Bulk, keys: DeploymentKeys, key: str) -> None:
    assert await bulk.read(key, 5_000_000, opening) is None

    sealing = sealing_of(bytes(5_000_000))
    await bulk.write(keys, key, sealing, TTL_MS)

    assert await bulk.read(key, sealing.size_bytes + 1, opening) is None


async def test_envelope_is_signed_and_verified_anew_when_its_connection_is_lost_half_way(
    redis: Control, bulk: Bulk, keys: DeploymentKeys, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = random_bytes(20 * PIECE_BYTES)
    sealing, cuts = sealing_of(value), await cut_at(redis, monkeypatch, "line", 10, 25)
    assert await bulk.write(keys, key, sealing, TTL_MS)
    assert cuts == []

    cuts = await cut_at(redis, monkeypatch, "fill", 12, 30)
    verified = await bulk.read(key, sealing.size_bytes, opening)

    assert cuts == []
    assert verified is not None and bytes(verified.body[-len(value) :]) == value


def test_pieces_under_way_are_few() -> None:
    """What a value takes in the server's buffers, and in ours."""
    assert UNDER_WAY * PIECE_BYTES <= 2 * 1024 * 1024
