"""Streams from end to end: every item once, in order, as it is produced, and no further ahead than the reader allows."""

import asyncio
import statistics
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from millstream.broker.connection import Control
from millstream.deployment import deployment
from millstream.errors import ConfigError, SerializationError
from millstream.handles.handle import DeploymentHandle, SyncHandle
from millstream.handles.ref import ObjectRef
from tests.handles.generators import Model, left_behind, nothing_is_left
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Serving

pytestmark = pytest.mark.anyio

LOOPS = pytest.mark.parametrize(
    "anyio_backend", ["asyncio", ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"]
)
KINDS = pytest.mark.parametrize(
    "method", ["count", "count_in_thread", "returns_generator", "returns_generator_in_thread"]
)
BOTH = pytest.mark.parametrize("method", ["count", "count_in_thread"])


def sync_handle(handle: DeploymentHandle) -> SyncHandle:
    return SyncHandle(handle.deployment_name, handle.app_name)


async def collect(stream: Any) -> list[Any]:
    return [item async for item in stream]


# all items, in order


@LOOPS
@KINDS
async def test_items_come_in_their_order(serving: Serving, method: str) -> None:
    handle = serving(Model)

    assert await collect(getattr(handle, method).stream(300)) == list(range(300))


@KINDS
def test_items_come_in_their_order_to_a_blocking_reader(serving: Serving, method: str) -> None:
    handle = serving.sync(Model)

    assert list(getattr(handle, method).stream(300)) == list(range(300))


async def test_remote_with_the_option_is_a_stream(serving: Serving) -> None:
    handle = serving(Model)

    assert await collect(handle.options(stream=True).count.remote(5)) == list(range(5))
    assert await collect(handle.options(method_name="count", stream=True).remote(5)) == list(range(5))


def test_remote_with_the_option_is_a_stream_for_a_blocking_reader(serving: Serving) -> None:
    stream: Any = serving.sync(Model).options(stream=True, method_name="count").remote(5)

    assert list(stream) == list(range(5))


async def test_function_may_be_a_generator(serving: Serving) -> None:
    async def letters(word: str) -> AsyncIterator[str]:
        for letter in word:
            yield letter

    handle = serving(letters)

    assert await collect(handle.stream("stream")) == list("stream")


@BOTH
async def test_empty_stream_ends_at_once(serving: Serving, method: str) -> None:
    handle = serving(Model)

    assert await collect(getattr(handle, method).stream(0)) == []


@pytest.mark.parametrize("method", ["blobs", "blobs_in_thread"])
async def test_items_of_all_sizes_come_in_their_order(serving: Serving, redis: Control, method: str) -> None:
    handle = serving(Model)
    sizes = [0, 10, 4096, 5000, 70_000, 1, 60_000, 3_000_000, 100, 64 * 1024, 200_000, 5]

    items = await collect(getattr(handle, method).stream(sizes))

    assert [(len(item), set(item)) for item in items] == [(s, {n} if s else set()) for n, s in enumerate(sizes)]
    await nothing_is_left(redis)


def test_items_of_all_sizes_come_in_their_order_to_a_blocking_reader(serving: Serving) -> None:
    handle = serving.sync(Model)
    sizes = [0, 5000, 70_000, 1, 1_000_000, 5]

    assert [len(item) for item in handle.blobs.stream(sizes)] == sizes


async def test_after_the_last_item_the_stream_stays_ended(serving: Serving) -> None:
    stream = serving(Model).count.stream(1)

    assert await collect(stream) == [0]
    assert await collect(stream) == []
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_nothing_is_left_of_a_stream_that_was_read_to_its_end(serving: Serving, redis: Control) -> None:
    handle = serving(Model)

    await collect(handle.count.stream(200))
    await collect(handle.blobs.stream([100_000] * 5))

    await nothing_is_left(redis)


# as they are produced


async def test_item_arrives_while_the_next_one_is_being_made(serving: Serving) -> None:
    gate = Gate()
    stream = serving(Model, gate).first_then_held.stream()

    first = await asyncio.wait_for(anext(stream), 5)
    was_held = gate.inside == 1 or gate.passed == 0
    gate.open()

    assert (first, was_held) == ("first", True)
    assert await collect(stream) == ["second"]


def test_item_arrives_while_the_next_one_is_being_made_at_a_blocking_reader(serving: Serving) -> None:
    gate = Gate()
    stream = serving.sync(Model, gate).first_then_held.stream()

    first = stream.next(5)
    gate.open()

    assert [first, *stream] == ["first", "second"]


@LOOPS
@pytest.mark.parametrize(("method", "plain"), [("count", "plain"), ("count_in_thread", "plain_in_thread")])
async def test_first_item_comes_about_as_fast_as_a_result(serving: Serving, method: str, plain: str) -> None:
    handle = serving(Model)
    times_s: dict[str, list[float]] = {"first": [], "result": []}

    for _ in range(100):
        started = time.perf_counter()
        stream = getattr(handle, method).stream(1)
        await anext(stream)
        times_s["first"].append(time.perf_counter() - started)
        await collect(stream)
        started = time.perf_counter()
        await getattr(handle, plain).call(0)
        times_s["result"].append(time.perf_counter() - started)

    first_s, result_s = (statistics.median(times_s[name]) for name in ("first", "result"))
    assert first_s < 3 * result_s + 0.002


# no further ahead than allowed


@BOTH
@pytest.mark.parametrize("max_ahead", [1, 2, 7, 64])
async def test_slow_reader_slows_the_producer(serving: Serving, method: str, max_ahead: int) -> None:
    handle = serving(Model, sync_threads=2)
    stream = getattr(handle, method).options(max_ahead=max_ahead).stream(10_000)

    for read in range(1, 20):
        assert await asyncio.wait_for(anext(stream), 5) == read - 1
        assert await handle.n_made.call() <= read + max_ahead

    await asyncio.sleep(0.1)
    assert await handle.n_made.call() <= 19 + max_ahead
    await stream.aclose()


@BOTH
async def test_stream_that_nobody_reads_stops_where_it_should(serving: Serving, method: str) -> None:
    handle = serving(Model, sync_threads=2)
    stream = getattr(handle, method).options(max_ahead=10).stream(10_000)

    async def is_full() -> bool:
        return bool(await handle.n_made.call() == 10)

    await wait_until(is_full)
    await asyncio.sleep(0.1)
    assert await is_full()
    assert await anext(stream) == 0


async def test_stream_may_be_read_in_lockstep(serving: Serving) -> None:
    assert await collect(serving(Model).count.options(max_ahead=1).stream(200)) == list(range(200))


# several at a time


async def test_two_streams_of_one_replica_do_not_mix(serving: Serving) -> None:
    handle = serving(Model)
    one, two = handle.count.stream(200), handle.count.stream(300)

    ones, twos = await asyncio.gather(collect(one), collect(two))

    assert (ones, twos) == (list(range(200)), list(range(300)))


async def test_hundred_streams_of_one_replica_at_once(serving: Serving, redis: Control) -> None:
    handle = serving(Model, max_ongoing_requests=100)

    read = await asyncio.gather(*[collect(handle.count.stream(n)) for n in range(100)])

    assert read == [list(range(n)) for n in range(100)]
    await nothing_is_left(redis)


async def test_stream_that_is_not_read_holds_up_no_other(serving: Serving) -> None:
    handle = serving(Model, max_ongoing_requests=10)
    idle = [handle.count.stream(10_000) for _ in range(5)]
    for stream in idle:
        await anext(stream)

    assert await asyncio.wait_for(collect(handle.count.stream(1000)), 10) == list(range(1000))


def test_streams_may_be_read_by_several_threads(serving: Serving) -> None:
    handle, read = serving.sync(Model, max_ongoing_requests=20), {}

    def reader(n: int) -> None:
        read[n] = list(handle.count.stream(100 + n))

    threads = [threading.Thread(target=reader, args=[n]) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert read == {n: list(range(100 + n)) for n in range(10)}


def test_stream_may_be_handed_to_another_thread(serving: Serving) -> None:
    stream, read = serving.sync(Model).count.stream(100), []
    read += [next(stream) for _ in range(50)]

    thread = threading.Thread(target=lambda: read.extend(stream))
    thread.start()
    thread.join(10)

    assert read == list(range(100))


async def test_blocking_stream_works_on_a_running_loop_and_warns_once(serving: Serving) -> None:
    """As in a notebook."""
    handle = serving.sync(Model)

    with pytest.warns(RuntimeWarning, match="blocks the running event loop.*`async for`"):
        first = list(handle.count.stream(3))
    again = list(handle.count.stream(3))

    assert first == again == [0, 1, 2]


async def test_stream_belongs_to_the_loop_that_it_was_made_on(serving: Serving) -> None:
    stream = serving(Model, Gate()).first_then_held.stream()
    await anext(stream)

    def read_elsewhere() -> None:
        asyncio.run(collect(stream))

    with pytest.raises(RuntimeError, match="belongs to the event loop that it was made on"):
        await asyncio.to_thread(read_elsewhere)


async def test_second_reader_of_a_stream_is_refused(serving: Serving) -> None:
    gate = Gate()
    stream = serving(Model, gate).first_then_held.stream()
    await anext(stream)
    waiting = asyncio.create_task(collect(stream))
    await asyncio.sleep(0.01)

    with pytest.raises(RuntimeError, match="one reader at a time"):
        await anext(stream)

    gate.open()
    assert await waiting == ["second"]


# inside of deployments


@deployment
class Outer:
    """Streams from another deployment."""

    def __init__(self, inner: DeploymentHandle) -> None:
        self._inner = inner

    async def doubled(self, n: int) -> AsyncIterator[int]:
        async for number in self._inner.count.stream(n):
            yield 2 * number

    def doubled_in_thread(self, n: int) -> Any:
        inner = SyncHandle(self._inner.deployment_name, self._inner.app_name)
        for number in inner.count.stream(n):
            yield 2 * number

    async def total(self, n: int) -> int:
        return sum([number async for number in self._inner.count.stream(n)])

    async def n_closed(self) -> Any:
        return await self._inner.n_closed.call()


@pytest.mark.parametrize("method", ["doubled", "doubled_in_thread"])
async def test_stream_may_be_made_of_another_deployments_stream(serving: Serving, method: str) -> None:
    handle = serving.graph(Outer.bind(deployment(Model).bind()))

    assert await collect(getattr(handle, method).stream(300)) == [2 * n for n in range(300)]


async def test_method_may_read_another_deployments_stream(serving: Serving) -> None:
    handle = serving.graph(Outer.bind(deployment(Model).bind()))

    assert await handle.total.call(100) == sum(range(100))


@pytest.mark.parametrize("method", ["doubled", "doubled_in_thread"])
async def test_closing_a_stream_closes_the_one_it_is_made_of(serving: Serving, method: str) -> None:
    handle = serving.graph(Outer.bind(deployment(Model).bind()))
    stream = getattr(handle, method).stream(100_000)
    await anext(stream)

    await stream.aclose()

    async def inner_is_closed() -> bool:
        return bool(await handle.n_closed.call() == 1)

    await wait_until(inner_is_closed)


# options and mistakes


async def test_stream_takes_refs_for_arguments(serving: Serving) -> None:
    handle = serving(Model)

    assert await collect(handle.count.stream(handle.plain.remote(3))) == [0, 1, 2]


async def test_stream_may_be_delayed(serving: Serving) -> None:
    handle, started = serving(Model), time.monotonic()

    assert await collect(handle.count.options(delay_s=0.2).stream(3)) == [0, 1, 2]
    assert time.monotonic() - started > 0.2


async def test_stream_has_an_id_by_which_others_see_its_state(serving: Serving) -> None:
    stream = serving(Model, Gate()).first_then_held.stream()
    await anext(stream)

    ref = ObjectRef.from_id(stream.ref_id)

    assert await ref.astatus() == "running"
    assert stream.ref_id in repr(stream)


async def test_state_of_a_stream_whose_id_was_read_is_kept_after_its_end(serving: Serving, redis: Control) -> None:
    stream = serving(Model).blobs.stream([100_000] * 3)
    ref = ObjectRef.from_id(stream.ref_id)

    assert len(await collect(stream)) == 3
    await asyncio.sleep(0.6)  # what is dropped goes in batches

    assert await ref.astatus() == "succeeded"
    assert [key.split(":")[2] for key in await left_behind(redis)] == ["result"]


async def test_stream_refuses_a_key_against_doubles(serving: Serving) -> None:
    handle = serving(Model)

    with pytest.raises(ConfigError, match="idempotency_key='k' is not for streams"):
        handle.count.options(idempotency_key="k").stream(3)


async def test_awaiting_a_stream_is_an_error_that_names_the_fix(serving: Serving) -> None:
    stream = serving(Model).count.stream(3)

    with pytest.raises(TypeError, match="async for item in stream"):
        await stream
    with pytest.raises(TypeError, match="no single result: iterate over it, or call without stream=True"):
        stream.result()


def test_result_of_a_blocking_stream_is_an_error_that_names_the_fix(serving: Serving) -> None:
    stream = serving.sync(Model).count.stream(3)

    with pytest.raises(TypeError, match="no single result: iterate over it, or call without stream=True"):
        stream.result(timeout=1)


@pytest.mark.parametrize("method", ["plain", "plain_in_thread"])
async def test_method_without_items_is_an_error_that_names_the_fix(serving: Serving, method: str) -> None:
    handle = serving(Model)

    with pytest.raises(TypeError, match="returned list, not a generator; call it without stream=True"):
        await collect(getattr(handle, method).stream([1, 2]))


@pytest.mark.parametrize("method", ["count", "count_in_thread", "returns_generator", "returns_generator_in_thread"])
async def test_generator_without_stream_is_an_error_that_names_the_fix(serving: Serving, method: str) -> None:
    handle = serving(Model)

    with pytest.raises(TypeError, match=r"is a generator; call .*handle.stream\(...\)"):
        await getattr(handle, method).call(3)
    assert await handle.n_calls.call() == 0


async def test_call_on_a_handle_that_streams_says_so(serving: Serving) -> None:
    handle = serving(Model).options(stream=True)

    with pytest.raises(TypeError, match=r"is a generator; call it with handle.stream\(...\), or iterate over what"):
        await handle.count.call(3)


async def test_stream_cannot_be_an_argument(serving: Serving) -> None:
    handle = serving(Model)

    with pytest.raises(SerializationError, match=r"arguments of app.Model.plain, \(args, kwargs\)\[0\]\[0\]\[0\]"):
        await handle.plain.call([handle.count.stream(3)])
