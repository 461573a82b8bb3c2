"""Large values inside of a replica: read, verified, written; and nothing left of an attempt whose outcome nobody wants."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from millstream.broker import bulk, pickling, remote_errors, scripts
from millstream.broker.cluster import dial
from millstream.broker.codec import Codec, Sealing, codec_for
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.pickling import Pickled
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError, MillstreamError, RefNotFoundError, SignatureError
from millstream.replicas.large import WRITE_TTL_MS, LargeValues
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Stage, cut

pytestmark = pytest.mark.anyio

REF = b"r" * 22
SIZE = 300_000


@pytest.fixture
async def large(settings: Settings, keys: DeploymentKeys) -> AsyncIterator[LargeValues]:
    large = LargeValues(settings, keys, "r-1")
    yield large
    large.close()


@pytest.fixture
def codec(settings: Settings, keys: DeploymentKeys) -> Codec:
    return codec_for(settings.secret_key, settings.namespace, keys.tag)


def pickled(value: Any) -> Pickled:
    found = pickling.dump_parts(value, "a value")
    assert isinstance(found, Pickled)
    return found


async def store_arguments(large: LargeValues, codec: Codec, keys: DeploymentKeys, value: Any) -> int:
    """As a handle does it; their size."""
    sealing = codec.sealing("request", REF, pickled(value), b"embed")
    await large._bulk.write(keys, keys.payload(REF.decode()), sealing, WRITE_TTL_MS)
    return sealing.size_bytes


# arguments


async def test_arguments_are_read_and_verified(large: LargeValues, codec: Codec, keys: DeploymentKeys) -> None:
    size = await store_arguments(large, codec, keys, (("x" * SIZE,), {}))

    opened = (await large.read_payload(REF, b"embed", size)).load()

    assert opened == (("x" * SIZE,), {})


async def test_arguments_that_are_gone_are_an_error_that_says_what_to_do(large: LargeValues) -> None:
    with pytest.raises(
        MillstreamError, match=r"are gone from the server: .* send it again, and see that its maxmemory-policy"
    ):
        await large.read_payload(REF, b"embed", SIZE)


@pytest.mark.parametrize("what", ["another method", "another request", "changed"])
async def test_arguments_of_something_else_are_refused(
    redis: Control, large: LargeValues, codec: Codec, keys: DeploymentKeys, what: str
) -> None:
    size, ref, method = await store_arguments(large, codec, keys, (("x" * SIZE,), {})), REF, b"embed"
    match what:
        case "another method":
            method = b"delete"
        case "another request":
            ref = b"s" * 22
            await redis.rename(keys.payload(REF.decode()), keys.payload(ref.decode()))
        case "changed":
            piece: Any = await redis.lindex(keys.payload(REF.decode()), 0)
            await redis.lset(keys.payload(REF.decode()), 0, piece[:-1] + b"y")

    with pytest.raises(SignatureError):
        await large.read_payload(ref, method, size)


# values of refs among the arguments


def supply(keys: DeploymentKeys, stored: bytes) -> dict[str, bytes]:
    return {f"{keys.tag}~{REF.decode()}": stored}


async def test_value_of_a_ref_is_read_from_where_it_lies(
    large: LargeValues, codec: Codec, keys: DeploymentKeys
) -> None:
    envelope = await large.write_value(REF, "1-1", pickled("x" * SIZE))

    (value,) = (await large.read_all(supply(keys, b"succeeded normal 1-1\n" + envelope))).values()

    assert value == "x" * SIZE


async def test_small_value_of_a_ref_is_where_it_stands(large: LargeValues, codec: Codec, keys: DeploymentKeys) -> None:
    envelope = codec.seal("value", REF, pickling.dump("small", "a value"))

    (value,) = (await large.read_all(supply(keys, b"succeeded normal 1-1\n" + envelope))).values()

    assert value == "small"


async def test_failed_ref_raises_its_error(large: LargeValues, codec: Codec, keys: DeploymentKeys) -> None:
    envelope = codec.seal("error", REF, remote_errors.capture(ValueError("upstream")))

    with pytest.raises(ValueError, match="upstream"):
        await large.read_all(supply(keys, b"failed normal 1-1\n" + envelope))


async def test_value_of_a_ref_that_has_expired_is_an_error(large: LargeValues, keys: DeploymentKeys) -> None:
    with pytest.raises(RefNotFoundError, match="has expired"):
        await large.read_all(supply(keys, b"succeeded normal 1-1\n@300000\n"))


# what is written


async def test_value_lies_under_a_key_of_its_attempt_until_it_is_announced(
    redis: Control, large: LargeValues, keys: DeploymentKeys
) -> None:
    envelope = await large.write_value(REF, "7-1", pickled("x" * SIZE))

    key = keys.value(REF.decode(), "7-1")
    assert envelope[:1] == b"@" and int(envelope[1:]) > SIZE
    assert 0 < await redis.pttl(key) <= WRITE_TTL_MS


async def test_item_says_where_it_lies(redis: Control, large: LargeValues, keys: DeploymentKeys) -> None:
    envelope = await large.write_item(REF, "3.7-1", pickled("x" * SIZE), b"3")

    size, part = envelope.split()
    assert int(size[1:]) > SIZE
    assert await redis.exists(keys.value(REF.decode(), part.decode()))


async def test_write_waits_out_an_outage(
    redis: Control, large: LargeValues, keys: DeploymentKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 0

    async def refused(*arguments: Any, **named: Any) -> Any:
        nonlocal failures
        if failures < 5:
            failures += 1
            raise BrokerUnavailableError("down")
        return await dial(*arguments, **named)

    monkeypatch.setattr(bulk, "dial", refused)

    await large.write_value(REF, "7-1", pickled("x" * SIZE))

    assert failures == 5
    assert await redis.exists(keys.value(REF.decode(), "7-1"))


# in a replica


class Model:
    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate or Gate()
        self.mutable = bytearray(SIZE)

    async def make(self, size: int) -> bytes:
        return b"x" * size

    async def held(self, size: int) -> bytes:
        await self.gate.wait()
        return b"x" * size

    async def size_of(self, value: Any) -> int:
        await self.gate.wait()
        return len(value)

    async def small(self, x: int) -> int:
        return x


async def value_keys(redis: Control, keys: DeploymentKeys) -> list[bytes]:
    return [key async for key in redis.scan_iter(f"{keys.value_prefix}*")]


async def test_value_of_an_attempt_that_was_taken_over_is_deleted(stage: Stage, redis: Control) -> None:
    gate = Gate()
    first = await stage.start(Model, gate, max_attempts=1)
    ref = await stage.handle.held.remote(SIZE)
    await wait_until(lambda: gate.inside == 1)
    await run(redis, scripts.release(stage.keys, "normal", first.name, "died", expired=False))

    gate.open()

    with pytest.raises(MillstreamError, match="the last one it had"):
        await ref
    await asyncio.sleep(0.1)
    assert await value_keys(redis, stage.keys) == []


async def test_value_of_a_request_that_is_cancelled_while_it_is_written_is_deleted(
    stage: Stage, redis: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, go_on = asyncio.Event(), asyncio.Event()
    original = LargeValues.write_value

    async def write_value(self: LargeValues, *arguments: Any) -> bytes:
        envelope = await original(self, *arguments)
        written.set()
        await go_on.wait()
        return envelope

    monkeypatch.setattr(LargeValues, "write_value", write_value)
    await stage.start(Model)
    ref = await stage.handle.make.remote(SIZE)
    await written.wait()

    assert await ref.acancel()

    async def is_deleted() -> bool:
        return not await value_keys(redis, stage.keys)

    await wait_until(is_deleted)
    assert await stage.handle.small.call(1) == 1


async def test_slot_stays_taken_until_the_value_is_written(
    stage: Stage, redis: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, original = asyncio.Event(), LargeValues.write_value

    async def write_value(self: LargeValues, *arguments: Any) -> bytes:
        await go_on.wait()
        return await original(self, *arguments)

    monkeypatch.setattr(LargeValues, "write_value", write_value)
    await stage.start(Model, max_ongoing_requests=1)
    large, small = stage.handle.make.call(SIZE), stage.handle.small.call(1)

    await asyncio.wait([small], timeout=0.1)
    assert not small.done()
    go_on.set()

    assert (len(await large), await small) == (SIZE, 1)


@pytest.mark.parametrize("what", ["writes", "bulk", "reads"])
async def test_value_is_delivered_though_the_connection_was_lost_while_it_was_written(
    stage: Stage, redis: Control, what: str
) -> None:
    gate = Gate()
    await stage.start(Model, gate)
    future = stage.handle.held.call(30_000_000)
    await wait_until(lambda: gate.inside == 1)

    gate.open()
    for _ in range(5):
        await asyncio.sleep(0.02)
        await cut(redis, f"ms:{what}:r-")

    assert len(await asyncio.wait_for(future, 20)) == 30_000_000


async def test_arguments_are_read_though_the_connection_was_lost_meanwhile(stage: Stage, redis: Control) -> None:
    gate = Gate()
    gate.open()
    await stage.start(Model, gate)
    future = stage.handle.size_of.call(b"x" * 30_000_000)

    for _ in range(10):
        await asyncio.sleep(0.02)
        await cut(redis, "ms:bulk:")

    assert await asyncio.wait_for(future, 20) == 30_000_000


async def test_request_that_is_cancelled_while_its_arguments_are_read_runs_nothing(
    stage: Stage, redis: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, original, gate = asyncio.Event(), LargeValues.read_payload, Gate()

    async def read_payload(self: LargeValues, *arguments: Any) -> Any:
        reading.set()
        await asyncio.sleep(0.05)
        return await original(self, *arguments)

    monkeypatch.setattr(LargeValues, "read_payload", read_payload)
    await stage.start(Model, gate, max_ongoing_requests=1)
    ref = await stage.handle.size_of.options(block_until="queued").remote(b"x" * SIZE)
    await reading.wait()

    assert await ref.acancel()

    assert await stage.handle.small.call(1) == 1
    assert gate.inside == gate.passed == 0


async def test_signing_a_large_value_leaves_the_loop_free(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    original = Sealing.sign

    def sign(self: Sealing) -> bytes:
        threads.append(threading.get_ident())
        return original(self)

    monkeypatch.setattr(Sealing, "sign", sign)
    await stage.start(Model)

    assert len(await stage.handle.make.call(5_000_000)) == 5_000_000

    assert threads
    assert threading.get_ident() not in threads
