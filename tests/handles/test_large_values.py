"""Large arguments and values from end to end: whole, writable, and as they were at the call."""

import asyncio
import resource
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest

import millstream
from millstream.broker import pickling
from millstream.broker.bulk import Bulk
from millstream.broker.connection import Control
from millstream.errors import PayloadTooLargeError
from millstream.handles.ref import ObjectRef
from tests.handles.generators import nothing_is_left
from tests.replica_helpers import Gate, Serving

np = pytest.importorskip("numpy")

from tests.handles.arrays import MB, Model, ones

pytestmark = pytest.mark.anyio

LOOPS = pytest.mark.parametrize(
    "anyio_backend", ["asyncio", ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"]
)


# there and back


@LOOPS
@pytest.mark.parametrize("method", ["echo", "echo_in_thread"])
@pytest.mark.parametrize("size", [64 * 1024, 65_537, 500_000, 30 * MB])
async def test_array_comes_back_equal_and_can_be_written_to(serving: Serving, method: str, size: int) -> None:
    handle = serving(Model)
    array = np.arange(size, dtype=np.uint8)

    again = await getattr(handle, method).call(array)

    assert np.array_equal(again, array)
    assert again.flags.writeable and again.flags.aligned
    again[0] = 7


@pytest.mark.parametrize(
    "value",
    [
        b"x" * 3 * MB,
        bytearray(3 * MB),
        "text" * MB,
        {"a": np.arange(100_000.0), "b": [np.ones((300, 300)), b"x" * 200_000], "c": "small"},
        [np.full(70_001 + n, n, np.uint8) for n in range(20)],
        (np.arange(200_000).reshape(400, 500).T, np.array(["text"] * 50_000)),
        list(range(50_000)),
    ],
    ids=["bytes", "bytearray", "text", "nested", "odd sizes", "not contiguous", "no buffers"],
)
async def test_large_value_of_any_kind_comes_back(serving: Serving, value: Any) -> None:
    again = await serving(Model).echo.call(value)

    np.testing.assert_equal(again, value)


async def test_all_arrays_of_a_value_can_be_written_to_and_are_their_own(serving: Serving) -> None:
    arrays = await serving(Model).echo.call([np.full(70_001 + n, n, np.uint8) for n in range(5)])

    arrays[1][:] = 77

    assert all(array.flags.writeable and array.flags.aligned for array in arrays)
    assert [int(array[0]) for array in arrays] == [0, 77, 2, 3, 4]


async def test_argument_can_be_changed_in_place(serving: Serving) -> None:
    assert (await serving(Model).add_one.call(ones(MB)) == 2).all()


def test_large_values_go_through_a_blocking_handle(serving: Serving) -> None:
    handle = serving.sync(Model)

    assert np.array_equal(handle.echo.call(ones(3 * MB)), ones(3 * MB))
    assert np.array_equal(handle.echo.remote(ones(3 * MB)).result(timeout=10), ones(3 * MB))
    assert [int(a.sum()) for a in handle.echo.map([ones(MB), ones(2 * MB)])] == [MB, 2 * MB]


async def test_many_large_values_travel_at_once(serving: Serving, redis: Control) -> None:
    handle = serving(Model)

    totals = await asyncio.gather(*[handle.total.call(ones(200_000 + n)) for n in range(50)])

    assert totals == [200_000 + n for n in range(50)]
    await nothing_is_left(redis)


async def test_large_arguments_of_a_delayed_request_wait_with_it(serving: Serving, redis: Control) -> None:
    handle = serving(Model)

    assert await handle.total.options(delay_s=0.3).call(ones(MB)) == MB
    await nothing_is_left(redis)


# by reference


async def test_value_that_was_put_is_an_argument_of_many(serving: Serving) -> None:
    handle = serving(Model)
    ref = await asyncio.to_thread(millstream.put, ones(2 * MB))

    assert await asyncio.gather(*[handle.total.call(ref, ref) for _ in range(5)]) == [4 * MB] * 5
    assert (await ref).sum() == 2 * MB
    assert (await ObjectRef.from_id(ref.id)).flags.writeable


async def test_large_value_goes_through_several_deployments(serving: Serving) -> None:
    first, second, third = serving(Model), serving(Model), serving(Model)

    made = first.make.remote(2 * MB)
    once = second.add_one.remote(made)
    twice = third.add_one.remote(once)

    assert await first.total.call(twice, once, made) == (3 + 2 + 1) * 2 * MB


async def test_ref_of_a_large_value_inside_of_a_container_stays_a_ref(serving: Serving) -> None:
    class Opener:
        async def __call__(self, refs: list[ObjectRef]) -> int:
            return int(sum([int((await ref).sum()) for ref in refs]))

    model, opener = serving(Model), serving(Opener)

    assert await opener.call([model.make.remote(MB), await model.make.remote(2 * MB)]) == 3 * MB


async def test_large_result_is_read_by_id_elsewhere(serving: Serving) -> None:
    handle = serving(Model)
    ref = await handle.make.remote(MB)

    def elsewhere() -> Any:
        return ObjectRef.from_id(ref.id).result(timeout=10)

    assert (await asyncio.to_thread(elsewhere)).sum() == MB
    assert (await ref).sum() == MB


async def test_readers_of_one_result_have_arrays_of_their_own(serving: Serving) -> None:
    gate = Gate()
    handle = serving(Model, gate)
    same = handle.echo.options(idempotency_key="k")
    one, two = same.call(ones(MB)), same.call(ones(MB))

    first, second = await one, await two
    first[:] = 9

    assert second.sum() == MB


async def test_failed_upstream_of_a_large_value_fails_its_dependant(serving: Serving) -> None:
    handle = serving(Model)

    with pytest.raises(TypeError):
        await handle.total.call(handle.make.remote("no size"), ones(MB))


# a moment's value


@pytest.mark.parametrize("how", ["call", "remote", "map", "delayed"])
async def test_change_of_an_array_after_the_call_changes_nothing_that_is_sent(serving: Serving, how: str) -> None:
    handle = serving(Model)
    array = ones(5 * MB)

    match how:
        case "call":
            pending: Any = handle.total.call(array)
        case "remote":
            pending = handle.total.remote(array)
        case "delayed":
            pending = handle.total.options(delay_s=0.05).call(array)
        case "map":
            pending = asyncio.gather(*[handle.total.call(array)])
    array[:] = 0

    result = await pending
    result = await result if isinstance(result, ObjectRef) else result
    assert result in (5 * MB, [5 * MB])


@pytest.mark.parametrize("how", ["remote", "map", "stream"])
def test_change_of_an_array_after_a_blocking_call_changes_nothing_that_is_sent(serving: Serving, how: str) -> None:
    """What returns before the value is there: all but `call`."""

    class Streamer(Model):
        async def totals(self, array: Any) -> Any:
            yield int(array.sum())

    handle = serving.sync(Streamer)
    array = ones(5 * MB)

    match how:
        case "remote":
            pending: Any = handle.total.remote(array)
        case "map":
            pending = handle.total.map(iter([array, array]), max_in_flight=2)
            first = next(pending)
            assert first == 5 * MB
        case "stream":
            pending = handle.totals.stream(array)
    array[:] = 0

    assert (pending.result(timeout=10) if how == "remote" else next(pending)) == 5 * MB


async def test_deployment_may_change_an_array_that_it_has_returned(serving: Serving) -> None:
    handle = serving(Model)

    values = await asyncio.gather(*[handle.its_own.call(n) for n in range(20)])

    assert [set(value.tolist()) for value in values] == [{n} for n in range(20)]


# the limit


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MILLSTREAM_PAYLOAD_LIMIT", "1000000")
    pickling.limit_bytes.cache_clear()
    yield
    pickling.limit_bytes.cache_clear()


@pytest.mark.usefixtures("limit")
async def test_argument_past_the_limit_is_refused_at_the_call(serving: Serving) -> None:
    handle = serving(Model)

    with pytest.raises(
        PayloadTooLargeError, match=r"arguments of app.Model.total, .* takes 1,000,1\d\d bytes, the limit is"
    ):
        handle.total.call(ones(MB))
    assert await handle.total.call(ones(MB - 1000)) == MB - 1000


@pytest.mark.usefixtures("limit")
async def test_result_past_the_limit_is_an_error_of_its_request(serving: Serving, redis: Control) -> None:
    handle = serving(Model)

    with pytest.raises(PayloadTooLargeError, match=r"a result of app.Model takes .* raise MILLSTREAM_PAYLOAD_LIMIT"):
        await handle.make.call(MB)
    assert await handle.small.call(1) == 1
    await nothing_is_left(redis)


@pytest.mark.usefixtures("limit", "connected")
def test_value_past_the_limit_is_not_put() -> None:
    with pytest.raises(PayloadTooLargeError, match="the value put takes"):
        millstream.put(ones(MB))


# small ones beside large ones


async def test_large_value_delays_no_small_request(serving: Serving) -> None:
    """Neither on the way there nor back; signing it takes a thread. The loop of caller and replica is free between pieces."""
    handle = serving(Model)
    waits_s: list[float] = []
    is_over = False

    async def ask() -> None:
        while not is_over:
            started = time.perf_counter()
            await handle.small.call(1)
            waits_s.append(time.perf_counter() - started)
            await asyncio.sleep(0.001)

    async with asyncio.TaskGroup() as group:
        group.create_task(ask())
        await asyncio.gather(*[handle.echo.call(ones(40 * MB)) for _ in range(2)])
        is_over = True

    assert len(waits_s) > 20
    assert statistics.median(waits_s) < 0.05
    assert sorted(waits_s)[len(waits_s) * 9 // 10] < 0.2


async def test_small_values_do_not_take_the_way_of_large_ones(
    serving: Serving, redis: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    monkeypatch.setattr(Bulk, "write", lambda *_: used.append("write"))
    monkeypatch.setattr(Bulk, "read", lambda *_: used.append("read"))
    handle = serving(Model)

    assert len(await handle.echo.call(b"x" * 60_000)) == 60_000

    assert used == []


def test_callers_memory_is_not_taken_more_than_twice(serving: Serving) -> None:
    """Once for what is sent (a blocking call sends the caller's own bytes), once for what comes. The replica is in this
    process as well: twice for that."""
    handle = serving.sync(Model)
    handle.echo.call(ones(MB))
    array = ones(80 * MB)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    again = handle.echo.call(array)

    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert again.nbytes == array.nbytes
    assert grown < 4 * array.nbytes
