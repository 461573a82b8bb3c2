"""How streams end before their last item: closed by the reader, failed, cancelled, out of time. Nothing is left of them."""

import asyncio
import gc
import multiprocessing
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import millstream
from millstream.broker import pickling
from millstream.broker.connection import Control
from millstream.errors import (
    BrokerUnavailableError,
    DeploymentNotFoundError,
    GetTimeoutError,
    RequestCancelledError,
    RequestTimeoutError,
    SerializationError,
    TaskError,
)
from millstream.handles import engines
from millstream.handles.handle import DeploymentHandle, SyncHandle
from millstream.handles.ref import ObjectRef
from tests.handles.generators import Model, is_closed, nothing_is_left, read_to_the_end
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Serving
from tests.timing import timed

pytestmark = pytest.mark.anyio

BOTH = pytest.mark.parametrize("method", ["count", "count_in_thread"])
FAILING = pytest.mark.parametrize("method", ["fail_after", "fail_after_in_thread"])


# closed by the reader


async def break_out(stream: Any) -> None:
    async for _ in stream:
        break
    del stream


async def close_it(stream: Any) -> None:
    await anext(stream)
    await stream.aclose()


async def leave_its_block(stream: Any) -> None:
    async with stream:
        await anext(stream)


async def fail_in_its_block(stream: Any) -> None:
    try:
        async with stream:
            await anext(stream)
            raise ZeroDivisionError
    except ZeroDivisionError:
        return


async def be_cancelled(stream: Any) -> None:
    async def read() -> None:
        async with stream:
            async for _ in stream:
                await asyncio.sleep(60)

    task = asyncio.create_task(read())
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.wait([task])


async def never_read(stream: Any) -> None:
    await asyncio.sleep(0.05)
    await stream.aclose()


@pytest.mark.parametrize("leave", [break_out, close_it, leave_its_block, fail_in_its_block, be_cancelled, never_read])
@BOTH
async def test_producer_stops_when_its_reader_leaves(
    serving: Serving, redis: Control, method: str, leave: Callable[[Any], Awaitable[None]]
) -> None:
    handle = serving(Model, sync_threads=2)

    await leave(getattr(handle, method).stream(100_000))

    await is_closed(handle)
    assert await handle.n_made.call() <= 70
    await nothing_is_left(redis)


async def test_dropping_a_stream_closes_it(serving: Serving, redis: Control) -> None:
    handle = serving(Model)
    stream = handle.count.stream(100_000)
    await anext(stream)

    del stream
    gc.collect()

    await is_closed(handle)
    await nothing_is_left(redis)


def break_out_blocking(stream: Any) -> None:
    for _ in stream:
        break
    del stream


def close_it_blocking(stream: Any) -> None:
    next(stream)
    stream.close()


def leave_its_block_blocking(stream: Any) -> None:
    with stream:
        next(stream)


@pytest.mark.parametrize("leave", [break_out_blocking, close_it_blocking, leave_its_block_blocking])
@BOTH
def test_producer_stops_when_its_blocking_reader_leaves(
    serving: Serving, method: str, leave: Callable[[Any], None]
) -> None:
    handle = serving.sync(Model, sync_threads=2)

    leave(getattr(handle, method).stream(100_000))

    deadline = time.monotonic() + 5
    while handle.n_closed.call() != 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@BOTH
async def test_slot_is_free_when_the_stream_is_closed(serving: Serving, method: str) -> None:
    handle = serving(Model, max_ongoing_requests=1)
    stream = getattr(handle, method).stream(100_000)
    await anext(stream)

    await stream.aclose()

    assert await asyncio.wait_for(handle.plain.call("free"), 5) == "free"


async def test_closed_stream_has_no_more_items(serving: Serving) -> None:
    stream = serving(Model).count.stream(100)
    await anext(stream)

    await stream.aclose()
    await stream.aclose()

    assert [item async for item in stream] == []


async def test_reader_that_waits_hears_that_its_stream_was_closed(serving: Serving) -> None:
    stream = serving(Model, Gate()).first_then_held.stream()
    await anext(stream)
    waiting = asyncio.create_task(anext(stream, "closed"))
    await asyncio.sleep(0.02)

    await stream.aclose()

    assert await asyncio.wait_for(waiting, 5) == "closed"


def test_thread_that_waits_hears_that_its_stream_was_closed(serving: Serving) -> None:
    read: list[str] = []
    stream = serving.sync(Model, Gate()).first_then_held.stream()
    waiting = threading.Thread(target=lambda: read.extend(stream))
    waiting.start()
    deadline = time.monotonic() + 5
    while read != ["first"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)

    stream.close()
    waiting.join(5)

    assert not waiting.is_alive()


async def test_large_items_that_were_not_read_are_deleted_on_close(serving: Serving, redis: Control) -> None:
    handle = serving(Model)
    stream = handle.blobs.options(max_ahead=5).stream([200_000] * 100)
    await anext(stream)

    async def is_ahead() -> bool:
        return bool(await handle.n_made.call() >= 5)

    await wait_until(is_ahead)

    await stream.aclose()

    await nothing_is_left(redis)


async def test_stream_of_a_deployment_without_replicas_can_be_closed(serving: Serving, redis: Control) -> None:
    handle = serving.deploy_only(Model)
    stream = handle.count.stream(3)
    await asyncio.sleep(0.05)

    await stream.aclose()

    await nothing_is_left(redis)


# waiting


async def test_wait_that_is_cancelled_loses_no_item(serving: Serving) -> None:
    read: list[int] = []
    stream = serving(Model).count.stream(30, 0.02)

    while len(read) < 30:
        try:
            read.append(await asyncio.wait_for(anext(stream), 0.007))
        except TimeoutError:
            continue

    assert read == list(range(30))


async def test_wait_for_a_large_item_that_is_cancelled_loses_no_item(serving: Serving) -> None:
    read: list[int] = []
    stream, misses = serving(Model).blobs.stream([3_000_000] * 5), 0

    while len(read) < 5:
        try:
            read.append((await asyncio.wait_for(anext(stream), 0.002 * (1 + misses)))[0])
        except TimeoutError:
            misses += 1

    assert read == list(range(5))
    assert misses > 0


def test_wait_that_takes_too_long_loses_no_item(serving: Serving) -> None:
    gate = Gate()
    stream = serving.sync(Model, gate).first_then_held.stream()
    assert stream.next(5) == "first"

    for timeout in (0, 0.05):
        with pytest.raises(GetTimeoutError, match="no further item within"):
            stream.next(timeout)
    gate.open()

    assert stream.next(5) == "second"
    with pytest.raises(StopIteration):
        stream.next(5)


# errors


@FAILING
@pytest.mark.parametrize("before", [0, 1, 100])
async def test_error_comes_after_the_items_before_it(serving: Serving, method: str, before: int) -> None:
    stream = getattr(serving(Model), method).stream(before)

    read, error = await read_to_the_end(stream)

    assert read == list(range(before))
    assert isinstance(error, ValueError) and isinstance(error, TaskError) and "in the middle" in str(error)
    assert [item async for item in stream] == []


@FAILING
def test_error_comes_after_the_items_before_it_to_a_blocking_reader(serving: Serving, method: str) -> None:
    stream = getattr(serving.sync(Model), method).stream(3)

    read = [next(stream) for _ in range(3)]
    with pytest.raises(ValueError, match="in the middle"):
        next(stream)

    assert read == [0, 1, 2]
    assert list(stream) == []


async def test_nothing_is_left_of_a_stream_that_failed(serving: Serving, redis: Control) -> None:
    stream = serving(Model).fail_after.stream(3)

    with pytest.raises(ValueError):
        _ = [item async for item in stream]

    await nothing_is_left(redis)


async def test_item_that_cannot_be_pickled_is_named(serving: Serving) -> None:
    stream = serving(Model).unpicklable.stream()

    assert await anext(stream) == 1
    with pytest.raises(SerializationError, match=r"item 1 of a stream of app.Model cannot be pickled: lock object"):
        await anext(stream)


async def test_item_past_the_limit_is_an_error(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = serving(Model)
    monkeypatch.setattr(pickling, "limit_bytes", lambda: 100_000)

    with pytest.raises(millstream.PayloadTooLargeError, match=r"item 1 of a stream of app.Model takes 200,0\d\d bytes"):
        _ = [item async for item in handle.blobs.stream([10, 200_000])]


async def test_arguments_that_do_not_fit_are_an_error_at_the_first_item(serving: Serving) -> None:
    stream = serving(Model).count.stream("one", "two", "three", "four")

    with pytest.raises(TypeError, match="positional arguments"):
        await anext(stream)


async def test_method_that_does_not_exist_is_an_error_at_the_first_item(serving: Serving) -> None:
    with pytest.raises(millstream.MillstreamError, match="has no method 'counts'"):
        await anext(serving(Model).counts.stream(3))


async def test_deployment_that_does_not_exist_is_an_error_at_the_first_item(connected: Any) -> None:
    with pytest.raises(DeploymentNotFoundError):
        await anext(DeploymentHandle("Nobody", "app").stream(3))


def test_deployment_that_does_not_exist_is_an_error_at_the_first_item_of_a_blocking_reader(connected: Any) -> None:
    with pytest.raises(DeploymentNotFoundError):
        next(SyncHandle("Nobody", "app").stream(3))


class Leaving:
    async def leave(self) -> Any:
        yield 1
        raise SystemExit(3)

    def leave_in_thread(self) -> Any:
        yield 1
        raise SystemExit(3)

    async def plain(self, x: int) -> int:
        return x


@pytest.mark.parametrize("method", ["leave", "leave_in_thread"])
async def test_generator_that_exits_does_not_take_the_replica_with_it(serving: Serving, method: str) -> None:
    handle = serving(Leaving, sync_threads=2)
    stream = getattr(handle, method).stream()

    assert await anext(stream) == 1
    with pytest.raises(BaseException, match=r"SystemExit|3"):
        await anext(stream)
    assert await handle.plain.call(5) == 5


# cancelled, out of time


@BOTH
async def test_stream_that_somebody_cancels_ends_in_that_error_after_its_items(
    serving: Serving, redis: Control, method: str
) -> None:
    handle = serving(Model, sync_threads=2)
    stream = getattr(handle, method).options(max_ahead=5).stream(100)
    assert await anext(stream) == 0
    await asyncio.sleep(0.1)

    assert await ObjectRef.from_id(stream.ref_id).acancel()

    read, error = await read_to_the_end(stream)
    assert isinstance(error, RequestCancelledError)
    assert read == list(range(1, 1 + len(read)))
    assert len(read) <= 5
    await is_closed(handle)


@BOTH
@timed
async def test_stream_that_is_out_of_time_ends_in_that_error_after_its_items(serving: Serving, method: str) -> None:
    handle = serving(Model, sync_threads=2)
    started = time.monotonic()

    read, error = await read_to_the_end(getattr(handle, method).options(timeout_s=0.3).stream(10_000, 0.01))

    assert isinstance(error, RequestTimeoutError)
    assert 0.25 < time.monotonic() - started < 3
    assert read == list(range(len(read))) and read
    await is_closed(handle)


async def test_slow_reader_is_out_of_time_as_well(serving: Serving) -> None:
    stream = serving(Model).count.options(timeout_s=0.2, max_ahead=3).stream(1000)

    read, error = await read_to_the_end(stream, pause_s=0.05)

    assert isinstance(error, RequestTimeoutError)
    assert read == list(range(len(read)))


# the end of everything


async def test_reader_that_waits_hears_of_the_end_of_its_connection(serving: Serving) -> None:
    stream = serving(Model, Gate()).first_then_held.stream()
    await anext(stream)
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(0.02)

    engines.current().close()

    with pytest.raises(BrokerUnavailableError, match="shutdown"):
        await asyncio.wait_for(waiting, 5)


def test_stream_ends_with_shutdown(serving: Serving) -> None:
    stream = serving.sync(Model, Gate()).first_then_held.stream()
    next(stream)

    millstream.shutdown()

    with pytest.raises(BrokerUnavailableError):
        next(stream)


def test_stream_cannot_be_read_by_a_forked_child(serving: Serving) -> None:
    gate = Gate()
    stream = serving.sync(Model, gate).first_then_held.stream()
    next(stream)
    said: Any = multiprocessing.get_context("fork").SimpleQueue()

    def read() -> None:
        try:
            next(stream)
        except BrokerUnavailableError as e:
            said.put(str(e))

    child = multiprocessing.get_context("fork").Process(target=read)
    child.start()
    child.join(10)
    gate.open()

    assert "parent of this process" in said.get()
    assert next(stream) == "second"
