"""What becomes of large values when something is lost, cancelled or refused; and that nothing is left of them in the end."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import millstream
from millstream.broker.bulk import Bulk
from millstream.broker.connection import Control
from millstream.broker.keys import split_ref
from millstream.errors import BackPressureError, RequestCancelledError
from millstream.handles import chores
from millstream.handles.handle import SyncHandle
from millstream.handles.ref import ObjectRef
from tests.handles.generators import left_behind, nothing_is_left
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Serving
from tests.servers import Server

pytest.importorskip("numpy")

from tests.handles.arrays import MB, Model, keys_of, ones

pytestmark = pytest.mark.anyio

LOOPS = pytest.mark.parametrize(
    "anyio_backend", ["asyncio", ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"]
)


# what is left


@pytest.mark.parametrize("how", ["call", "dropped", "dependant", "cancelled call"])
async def test_nothing_is_left_of_what_nobody_can_ask_for(serving: Serving, redis: Control, how: str) -> None:
    handle = serving(Model)

    match how:
        case "call":
            await handle.echo.call(ones(MB))
        case "dropped":
            ref = await handle.echo.remote(ones(MB))
            del ref
        case "dependant":
            await handle.total.call(ones(MB))
        case "cancelled call":
            future = handle.echo.call(ones(MB))
            await asyncio.sleep(0.01)
            future.cancel()

    await nothing_is_left(redis)


async def test_result_that_somebody_may_ask_for_is_kept_for_its_ttl(serving: Serving, redis: Control) -> None:
    handle = serving(Model, result_ttl_s=100)
    ref = await handle.make.remote(MB)
    assert (await ref).sum() == MB
    _, local = split_ref(ref.id)

    kept = await left_behind(redis)

    assert len(kept) == 2
    assert all(local in key for key in kept)
    assert [90 < await redis.ttl(key) <= 100 for key in kept] == [True, True]


async def test_arguments_of_a_queued_request_do_not_expire(serving: Serving, redis: Control) -> None:
    handle = serving.deploy_only(Model)
    future = handle.total.call(ones(MB))

    async def is_there() -> bool:
        return any(":payload:" in key for key in await left_behind(redis)) and bool(
            await redis.hlen(keys_of(handle).open)
        )

    await wait_until(is_there)
    (payload,) = [key for key in await left_behind(redis) if ":payload:" in key]

    assert await redis.ttl(payload) == -1
    await asyncio.to_thread(serving.start_replica, handle, Model)
    assert await future == MB
    await nothing_is_left(redis)


async def test_arguments_of_a_refused_request_are_deleted(serving: Serving, redis: Control) -> None:
    handle = serving.deploy_only(Model, max_queued_requests=1)
    first = await handle.options(block_until="queued").small.remote(1)

    with pytest.raises(BackPressureError):
        await handle.total.call(ones(MB))

    async def is_deleted() -> bool:
        return not any(":payload:" in key for key in await left_behind(redis))

    await wait_until(is_deleted)
    assert await first.acancel()


@pytest.mark.parametrize("when", ["queued", "running"])
async def test_arguments_of_a_cancelled_request_are_deleted(serving: Serving, redis: Control, when: str) -> None:
    gate = Gate()
    handle = serving.deploy_only(Model) if when == "queued" else serving(Model, gate)
    ref = await handle.held_total.options(block_until="queued").remote(ones(MB))
    if when == "running":
        await wait_until(lambda: gate.inside == 1)

    assert await ref.acancel()

    with pytest.raises(RequestCancelledError):
        await ref

    async def is_deleted() -> bool:
        return not any(":payload:" in key for key in await left_behind(redis))

    await wait_until(is_deleted)


async def test_request_that_is_cancelled_while_its_arguments_are_on_their_way(serving: Serving, redis: Control) -> None:
    handle = serving(Model)
    ref = handle.options(block_until="queued").total.remote(ones(30 * MB)).ref

    assert await ref.acancel()

    with pytest.raises(RequestCancelledError):
        await ref


# failures


@pytest.fixture
def delete(server: Server) -> Callable[[str], None]:
    """Delete a key, in any thread and loop."""

    def delete(key: str) -> None:
        with server.connect_blocking() as client:
            client.delete(key)

    return delete


def watch_writes(monkeypatch: pytest.MonkeyPatch, word: str, lose: Callable[[str], Any] | None = None) -> list[str]:
    """The keys with `word` in them that are written from now on; after the first one, `lose(key)` is called."""
    original, written = Bulk.write, list[str]()

    async def write(self: Bulk, keys: Any, key: str, *arguments: Any, **options: Any) -> Any:
        answer = await original(self, keys, key, *arguments, **options)
        if word in key:
            written.append(key)
            if len(written) == 1 and lose is not None:
                lose(key)
        return answer

    monkeypatch.setattr(Bulk, "write", write)
    return written


async def test_arguments_that_are_lost_before_the_submit_are_written_again(
    serving: Serving, delete: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = serving(Model)
    written = watch_writes(monkeypatch, ":payload:", delete)

    assert await handle.total.call(ones(MB)) == MB

    assert len(written) == 2


async def test_arguments_that_are_lost_before_a_parked_request_is_stored_are_written_again(
    serving: Serving, delete: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = serving(Model)
    written = watch_writes(monkeypatch, ":payload:", delete)

    assert await handle.total.call(ones(MB), handle.make.remote(100)) == MB + 100

    assert len(written) == 2


async def test_arguments_that_are_lost_before_a_replica_reads_them_fail_the_request(
    serving: Serving, redis: Control
) -> None:
    handle = serving.deploy_only(Model)
    ref = await handle.total.options(block_until="queued").remote(ones(MB))
    (payload,) = [key for key in await left_behind(redis) if ":payload:" in key]
    await redis.delete(payload)

    await asyncio.to_thread(serving.start_replica, handle, Model)

    with pytest.raises(millstream.MillstreamError, match=r"are gone from the server.*maxmemory-policy is noeviction"):
        await ref


async def test_value_that_is_lost_before_its_end_was_announced_fails_the_request(
    serving: Serving, delete: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = serving(Model)
    watch_writes(monkeypatch, ":value:", delete)

    with pytest.raises(millstream.MillstreamError, match="lost the value before it could be announced"):
        await handle.make.call(MB)


async def test_value_that_has_expired_is_an_error_and_no_hang(serving: Serving, redis: Control) -> None:
    handle = serving(Model)
    ref = await handle.make.remote(MB)
    await ref
    async for key in redis.scan_iter(f"{keys_of(handle).value_prefix}*"):
        await redis.delete(key)

    with pytest.raises(millstream.RefNotFoundError, match="has expired"):
        await ObjectRef.from_id(ref.id)
    with pytest.raises(millstream.RefNotFoundError):
        await handle.total.call(ObjectRef.from_id(ref.id))


async def test_value_that_may_not_be_read_is_an_error_and_no_hang(serving: Serving, redis: Control) -> None:
    handle = serving(Model)
    await redis.acl_setuser("default", enabled=True, nopass=True, commands=["+@all", "-lindex"])
    try:
        with pytest.raises(Exception, match="NOPERM"):
            await asyncio.wait_for(handle.make.call(MB), 10)
    finally:
        await redis.acl_setuser("default", enabled=True, nopass=True, commands=["+@all"])


async def test_submit_that_is_repeated_leaves_the_arguments_as_they_are(
    serving: Serving, redis: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reply was lost with the connection: the request may run already, on those very bytes."""
    gate = Gate()
    handle = serving(Model, gate)
    original, calls = chores.Chores._submit, 0

    async def submit(self: Any, request: Any) -> Any:
        nonlocal calls
        calls += 1
        answer = await original(self, request)
        if calls == 1:
            await wait_until(lambda: gate.inside == 1)
            raise millstream.BrokerUnavailableError("the reply was lost")
        return answer

    monkeypatch.setattr(chores.Chores, "_submit", submit)
    written = watch_writes(monkeypatch, ":payload:")

    future = handle.held_total.call(ones(MB))
    await wait_until(lambda: calls == 2)
    (payload,) = [key for key in await left_behind(redis) if ":payload:" in key]
    ttl = await redis.ttl(payload)
    gate.open()

    assert await future == MB
    assert (len(written), ttl) == (1, -1)


async def test_second_request_with_a_key_leaves_the_arguments_of_the_first(serving: Serving, redis: Control) -> None:
    gate = Gate()
    handle = serving(Model, gate).held_total.options(idempotency_key="k")
    first = handle.call(ones(MB))
    await wait_until(lambda: gate.inside == 1)

    def again() -> Any:
        return SyncHandle("Model", "app").held_total.options(idempotency_key="k").call(ones(2 * MB))

    second = asyncio.create_task(asyncio.to_thread(again))
    await asyncio.sleep(0.1)
    (payload,) = [key for key in await left_behind(redis) if ":payload:" in key]
    ttl = await redis.ttl(payload)
    gate.open()

    assert (await first, await second, ttl) == (MB, MB, -1)


async def test_full_server_refuses_large_arguments(serving: Serving, redis: Control) -> None:
    handle = serving(Model)
    await handle.small.call(1)
    await redis.config_set("maxmemory", "3mb")
    try:
        with pytest.raises(BackPressureError, match="out of memory"):
            await handle.total.call(ones(10 * MB))
    finally:
        await redis.config_set("maxmemory", "0")

    assert await handle.total.call(ones(MB)) == MB


async def test_large_value_that_was_tampered_with_is_refused(serving: Serving, redis: Control) -> None:
    handle = serving(Model)
    ref = await handle.make.remote(MB)
    await ref
    (value,) = [key for key in await left_behind(redis) if ":value:" in key]
    last: Any = await redis.lindex(value, -1)

    await redis.lset(value, -1, last[:-1] + bytes([last[-1] ^ 1]))

    with pytest.raises(millstream.SignatureError):
        await ObjectRef.from_id(ref.id)


# what a dependant needs


async def test_value_that_a_dependant_needs_outlives_its_ttl(serving: Serving, redis: Control) -> None:
    """It waits for another argument, for longer than the value would live; sweepers renew what it holds."""
    gate = Gate()
    handle = serving(Model, gate, result_ttl_s=5)
    made = await handle.make.remote(MB)
    await made
    (value,) = [key for key in await left_behind(redis) if ":value:" in key]
    future = handle.total.call(made, handle.held_array.remote(70_000))
    keys = keys_of(handle)

    async def ttl_is(least_s: int) -> bool:
        return bool(await redis.ttl(value) > least_s)

    await wait_until(lambda: ttl_is(3000))
    await redis.pexpire(value, 4000)
    holds: Any = redis.hgetall(keys.holds)
    ((ref, held),) = (await holds).items()
    await redis.hset(keys.holds, ref, b"0 " + held.partition(b" ")[2])
    await wait_until(lambda: ttl_is(3000))
    gate.open()

    assert await future == MB + 70_000
    assert not await redis.exists(keys.holds)


async def test_value_that_a_parked_request_has_lost_fails_it(serving: Serving, redis: Control) -> None:
    gate = Gate()
    handle = serving(Model, gate)
    future = handle.total.call(handle.make.remote(MB), handle.held_array.remote(70_000))

    async def is_supplied() -> bool:
        return bool(await redis.exists(keys_of(handle).holds))

    await wait_until(is_supplied)
    (value,) = [key for key in await left_behind(redis) if ":value:" in key]
    await redis.delete(value)
    gate.open()

    with pytest.raises(millstream.RefNotFoundError, match="has expired"):
        await future
