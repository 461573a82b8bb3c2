"""What a streaming method may return, on the loop and in threads, and how it ends."""

import asyncio
import contextvars
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from millstream.errors import MillstreamError, SerializationError
from tests.replicas.streams import BOTH, Bench, Counting, counting, counting_in_thread

pytestmark = pytest.mark.anyio


# what a method may return


class Streamer:
    """As an object made by a decorator: called, it gives an async iterator."""

    async def __call__(self) -> AsyncIterator[int]:
        for number in range(3):
            yield number


class OnlyAiter:
    def __aiter__(self) -> AsyncIterator[int]:
        return counting(3)()  # type: ignore[no-any-return]


async def returns_async_generator() -> Any:
    return counting(3)()


async def returns_generator() -> Any:
    return counting_in_thread(3)()


async def returns_async_iterable() -> Any:
    return OnlyAiter()


def returns_generator_in_thread() -> Any:
    return counting_in_thread(3)()


def returns_iterator_in_thread() -> Any:
    return iter([0, 1, 2])


def returns_async_generator_in_thread() -> Any:
    return counting(3)()


@pytest.mark.parametrize(
    "call",
    [
        counting(3),
        counting_in_thread(3),
        functools.partial(counting(3)),
        Streamer(),
        Streamer().__call__,
        returns_async_generator,
        returns_generator,
        returns_async_iterable,
        returns_generator_in_thread,
        returns_iterator_in_thread,
        returns_async_generator_in_thread,
    ],
    ids=lambda call: getattr(call, "__name__", type(call).__name__),
)
async def test_whatever_makes_items_is_a_stream(bench: Bench, call: Callable[[], Any]) -> None:
    assert await bench.produce(call) == 3

    await bench.holds(3)


@BOTH
async def test_empty_stream_has_no_items(bench: Bench, counting: Counting) -> None:
    assert await bench.produce(counting(0)) == 0
    assert await bench.numbers() == []


async def returns_list() -> list[int]:
    return [1, 2]


def returns_text_in_thread() -> str:
    return "text"


def returns_nothing_in_thread() -> None:
    return None


@pytest.mark.parametrize(
    ("call", "what"), [(returns_list, "list"), (returns_text_in_thread, "str"), (returns_nothing_in_thread, "NoneType")]
)
async def test_method_that_makes_no_items_is_an_error_that_names_the_fix(
    bench: Bench, call: Callable[[], Any], what: str
) -> None:
    with pytest.raises(TypeError, match=f"returned {what}, not a generator; call it without stream=True, or have it"):
        await bench.produce(call)


async def test_method_that_raises_stop_iteration_ends_in_an_error_and_no_hang(bench: Bench) -> None:
    def stop() -> Any:
        raise StopIteration("too early")

    with pytest.raises(RuntimeError, match="StopIteration"):
        await bench.produce(stop)


# threads


async def test_method_that_is_not_async_runs_in_a_thread_from_its_first_line(bench: Bench) -> None:
    threads: list[str] = []

    def returns_generator() -> Any:
        threads.append(threading.current_thread().name)
        time.sleep(0.01)  # on the loop this would hold up everybody

        def generate() -> Iterator[int]:
            threads.append(threading.current_thread().name)
            yield 1

        return generate()

    await bench.produce(returns_generator)

    assert len(threads) == 2
    assert all(name.startswith("bench") for name in threads)


async def test_thread_sees_the_context_of_its_request(bench: Bench) -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name")
    name.set("request")

    def generate() -> Iterator[str]:
        yield name.get()

    await bench.produce(generate)
    await bench.holds(1)

    assert await bench.items() == ["request"]


async def test_thread_that_waits_for_a_slow_reader_ends_when_the_stream_is_closed(bench: Bench) -> None:
    made: list[int] = []
    closed = threading.Event()

    def generate() -> Iterator[int]:
        try:
            for number in range(100):
                made.append(number)
                yield number
        finally:
            closed.set()

    producing = bench.start_producing(generate, 3)
    await bench.holds(3)

    bench.emitters.close((bench.one.lane, bench.one.entry))

    with pytest.raises(asyncio.CancelledError):
        await producing
    assert closed.is_set()
    assert made == [0, 1, 2]  # not one more


# errors


async def fails_in_the_middle() -> AsyncIterator[int]:
    yield 0
    yield 1
    raise ValueError("in the middle")


def fails_in_the_middle_in_thread() -> Iterator[int]:
    yield 0
    yield 1
    raise ValueError("in the middle")


@pytest.mark.parametrize("call", [fails_in_the_middle, fails_in_the_middle_in_thread])
async def test_items_before_an_error_are_stored(bench: Bench, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="in the middle"):
        await bench.produce(call)

    await bench.holds(2)


async def test_generator_is_closed_when_an_item_cannot_be_pickled(bench: Bench) -> None:
    for is_in_thread in (False, True):
        closed = threading.Event()

        async def generate(closed: threading.Event = closed) -> AsyncIterator[Any]:
            try:
                yield 1
                yield threading.Lock()
            finally:
                closed.set()

        def generate_in_thread(closed: threading.Event = closed) -> Iterator[Any]:
            try:
                yield 1
                yield threading.Lock()
            finally:
                closed.set()

        with pytest.raises(SerializationError, match=r"item 1 of a stream of app.Model cannot be pickled: lock"):
            await bench.produce(generate_in_thread if is_in_thread else generate)
        assert closed.is_set()


async def test_server_that_refuses_items_fails_the_stream(bench: Bench) -> None:
    await bench.redis.set(bench.keys.items(bench.one.ref), "no stream", ex=60)

    async def generate() -> AsyncIterator[int]:
        for number in range(100):
            yield number
            await asyncio.sleep(0.005)

    with pytest.raises(MillstreamError, match=r"did not take an item of this stream .*WRONGTYPE"):
        await bench.produce(generate)
