"""Batched async generators: each caller gets its own items, may end before the others, and may leave."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from millstream import serve
from millstream.errors import MillstreamError
from millstream.handles.context import Request, current
from millstream.replicas import batch_queue
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Stage
from tests.replicas.batched import NEVER_S, passes, start, together

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    yield
    await wait_until(lambda: batch_queue._queues == {})


async def all_of(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


class Counter:
    """Each of its callers gets the numbers below the one it gave."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.is_closed = False

    @serve.batch(max_batch_size=3, batch_wait_timeout_s=NEVER_S)
    async def count(self, limits: list[int]) -> AsyncIterator[list[Any]]:
        try:
            for step in range(max(limits)):
                self.steps.append(step)
                yield [step if step < limit else StopIteration for limit in limits]
                await asyncio.sleep(0)
        finally:
            self.is_closed = True


async def test_each_caller_gets_its_own_items() -> None:
    counter = Counter()

    counts = await together(*(all_of(counter.count(limit)) for limit in (1, 3, 2)))

    assert counts == [[0], [0, 1, 2], [0, 1]]
    assert counter.steps == [0, 1, 2]


async def test_call_counts_from_when_it_is_made() -> None:
    counter = Counter()
    first, *others = [counter.count(limit) for limit in (2, 1, 1)]

    assert await all_of(first) == [0, 1]
    assert [await all_of(other) for other in others] == [[0], [0]]


@pytest.mark.parametrize("sentinel", [StopIteration, StopAsyncIteration])
@pytest.mark.parametrize("length", [0, 1, 4])
async def test_function_ends_its_callers_by_an_item_or_by_its_end(sentinel: Any, length: int) -> None:
    @serve.batch(max_batch_size=2, batch_wait_timeout_s=NEVER_S)
    async def function(xs: list[int], ys: list[int]) -> AsyncIterator[list[Any]]:
        for step in range(length):
            yield [(step, x, y) for x, y in zip(xs, ys, strict=True)]
        yield [sentinel, "more"]

    one, other = await together(all_of(function(1, 2)), all_of(function(ys=4, xs=3)))

    assert one == [(step, 1, 2) for step in range(length)]
    assert other == [*((step, 3, 4) for step in range(length)), "more"]


async def test_error_goes_to_all_who_still_listen() -> None:
    @serve.batch(max_batch_size=3, batch_wait_timeout_s=NEVER_S)
    async def function(xs: list[int]) -> AsyncIterator[list[Any]]:
        yield xs
        yield [StopIteration, *xs[1:]]
        raise ValueError("broken")

    async def collect(x: int) -> list[Any]:
        found: list[Any] = []
        try:
            async for item in function(x):
                found.append(item)
        except ValueError as e:
            found.append(str(e))
        return found

    assert await together(collect(1), collect(2), collect(3)) == [[1], [2, 2, "broken"], [3, 3, "broken"]]


async def test_error_bears_no_frames_of_other_callers() -> None:
    @serve.batch(max_batch_size=2, batch_wait_timeout_s=NEVER_S)
    async def function(xs: list[int]) -> AsyncIterator[list[Any]]:
        raise ValueError("broken")
        yield xs

    async def depth(x: int) -> int:
        frames = 0
        try:
            await all_of(function(x))
        except ValueError as e:
            traceback = e.__traceback__
            while traceback is not None:
                frames, traceback = frames + 1, traceback.tb_next
        return frames

    one, other = await together(depth(1), depth(2))

    assert one == other


@pytest.mark.parametrize("length", [1, 3])
async def test_list_of_another_length_is_an_error_for_all(length: int) -> None:
    @serve.batch(max_batch_size=2, batch_wait_timeout_s=NEVER_S)
    async def function(xs: list[int]) -> AsyncIterator[list[Any]]:
        yield xs
        yield [0] * length

    for stream in [function(1), function(2)]:
        assert isinstance(await anext(stream), int)
        with pytest.raises(MillstreamError, match=f"function yielded {length} items for a batch of 2 calls"):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_call_with_wrong_arguments_fails_when_it_is_made() -> None:
    with pytest.raises(TypeError, match="missing a required argument"):
        Counter().count()


async def test_caller_that_leaves_disturbs_nobody() -> None:
    counter = Counter()
    first, second, third = [counter.count(limit) for limit in (5, 5, 2)]
    assert await anext(first) == 0

    await first.aclose()

    assert await together(all_of(second), all_of(third)) == [[0, 1, 2, 3, 4], [0, 1]]


async def test_caller_cancelled_before_the_batch_is_left_out() -> None:
    counter = Counter()
    (waiting,) = start(all_of(counter.count(9)))
    await passes()

    waiting.cancel()
    await asyncio.wait([waiting])

    assert await together(*(all_of(counter.count(1)) for _ in range(3))) == [[0]] * 3
    assert counter.steps == [0]


async def test_generator_is_closed_when_no_caller_listens() -> None:
    counter = Counter()
    streams = [counter.count(10**9) for _ in range(3)]
    for stream in streams:
        await anext(stream)

    for stream in streams:
        await stream.aclose()

    await wait_until(lambda: counter.is_closed)


async def test_slow_caller_does_not_hold_up_the_others() -> None:
    counter = Counter()
    streams = [counter.count(4) for _ in range(3)]

    assert await all_of(streams[0]) == [0, 1, 2, 3]
    assert counter.is_closed
    assert await all_of(streams[1]) == await all_of(streams[2]) == [0, 1, 2, 3]


async def test_batch_of_a_generator_knows_its_model() -> None:
    @serve.batch(max_batch_size=2, batch_wait_timeout_s=NEVER_S)
    async def function(xs: list[int]) -> AsyncIterator[list[Any]]:
        yield [serve.get_multiplexed_model_id()] * len(xs)
        await asyncio.sleep(0)
        yield [serve.get_multiplexed_model_id()] * len(xs)

    async def caller(model_id: str) -> list[Any]:
        current.set(Request("app.Model", b"1", model_id))
        return await all_of(function(1))

    assert await together(*start(*map(caller, "abab"))) == [[name] * 2 for name in "abab"]


async def test_setters_while_a_batch_streams() -> None:
    counter = Counter()
    streams = [counter.count(2) for _ in range(3)]
    assert await anext(streams[0]) == 0

    counter.count.set_max_batch_size(1)

    assert await all_of(counter.count(1)) == [0]
    assert await all_of(streams[0]) == [1]


class Totals(Counter):
    async def __call__(self, limit: int) -> int:
        return sum([x async for x in self.count(limit)])


async def test_requests_of_a_replica_share_a_generator(stage: Stage) -> None:
    await stage.start(Totals)

    assert await together(*(stage.handle.call(limit) for limit in (2, 3, 4))) == [1, 3, 6]


async def test_gate_of_one_model_does_not_hold_up_another() -> None:
    gate = Gate()

    @serve.batch(max_batch_size=1, max_concurrent_batches=2)
    async def function(xs: list[int]) -> AsyncIterator[list[Any]]:
        if serve.get_multiplexed_model_id() == "slow":
            await gate.wait()
        yield xs

    async def caller(model_id: str) -> list[Any]:
        current.set(Request("app.Model", b"1", model_id))
        return await all_of(function(1))

    slow, quick = start(caller("slow"), caller("quick"))
    assert await quick == [1] and not slow.done()
    gate.open()
    assert await slow == [1]
