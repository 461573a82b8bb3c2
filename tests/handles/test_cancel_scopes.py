"""Waiting that is cancelled or times out, under anyio and asyncio: nothing leaks, the request goes on, and can be awaited later."""

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import anyio
import pytest

from millstream.handles import engines
from millstream.handles.engine import Engine
from millstream.handles.ref import ObjectRef
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Serving

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


class Model:
    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate or Gate()

    async def __call__(self, x: Any = None) -> Any:
        await self._gate.wait()
        return x

    async def fail(self) -> None:
        await self._gate.wait()
        raise KeyError("x")

    async def count(self) -> AsyncIterator[int]:
        yield 0
        await self._gate.wait()
        yield 1


@pytest.fixture
def complaints() -> Iterator[list[dict[str, Any]]]:
    """What this test's loop is told that nobody caught; there must be nothing."""
    found: list[dict[str, Any]] = []
    yield found
    gc.collect()
    assert found == []


async def listen(complaints: list[dict[str, Any]]) -> Engine:
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    return engines.current()


def watchers_of(ref: ObjectRef) -> int:
    assert ref._cell is not None
    return len(ref._cell._on_end) + len(ref._cell._on_match)


Wait = Callable[[Awaitable[Any]], Awaitable[None]]


async def in_a_cancel_scope(what: Awaitable[Any]) -> None:
    with anyio.move_on_after(0.02) as scope:
        await what
    assert scope.cancelled_caught


async def in_fail_after(what: Awaitable[Any]) -> None:
    with pytest.raises(TimeoutError), anyio.fail_after(0.02):
        await what


async def in_a_task_group(what: Awaitable[Any]) -> None:
    async def wait() -> None:
        await what

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(wait)
        await anyio.sleep(0.02)
        group.cancel_scope.cancel()


async def in_asyncio_timeout(what: Awaitable[Any]) -> None:
    async def wait() -> None:
        async with asyncio.timeout(0.02):
            await what

    with pytest.raises(TimeoutError):
        await wait()


async def in_wait_for(what: Awaitable[Any]) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(what, 0.02)


async def in_a_cancelled_task(what: Awaitable[Any]) -> None:
    async def wait() -> None:
        await what

    task = asyncio.create_task(wait())
    await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


WAYS: list[Wait] = [
    in_a_cancel_scope, in_fail_after, in_a_task_group, in_asyncio_timeout, in_wait_for, in_a_cancelled_task,
]  # fmt: skip


@pytest.mark.parametrize("wait", WAYS)
async def test_ref_that_was_given_up_on_can_be_awaited_later(
    serving: Serving, complaints: list[dict[str, Any]], wait: Wait
) -> None:
    await listen(complaints)
    gate = Gate()
    ref = await serving(Model, gate).remote(1)

    await wait(ref)

    assert watchers_of(ref) == 0
    gate.open()
    assert await ref == 1


@pytest.mark.parametrize("method", ["__call__", "fail"])
@pytest.mark.parametrize("wait", WAYS)
async def test_call_that_was_given_up_on_goes_on_and_leaves_nothing(
    serving: Serving, complaints: list[dict[str, Any]], wait: Wait, method: str
) -> None:
    engine = await listen(complaints)
    gate = Gate()
    handle = serving(Model, gate)

    await wait(handle.options(method_name=method).call())
    await wait_until(lambda: gate.inside == 1, what="its start, which comes all the same")
    gate.open()

    await wait_until(lambda: not engine.pending)
    assert gate.passed == 1


async def test_task_of_a_request_that_runs_already_can_be_awaited_later(
    serving: Serving, complaints: list[dict[str, Any]]
) -> None:
    await listen(complaints)
    gate = Gate()
    task = serving(Model, gate).remote(1)
    await wait_until(lambda: gate.inside == 1)
    await task

    with anyio.CancelScope() as scope:
        scope.cancel()
        await task

    gate.open()
    assert await (await task) == 1


async def test_stream_that_was_given_up_on_between_items_loses_none(
    serving: Serving, complaints: list[dict[str, Any]]
) -> None:
    await listen(complaints)
    gate = Gate()
    stream = serving(Model, gate).count.stream()
    items = [await anext(stream)]

    with anyio.move_on_after(0.02) as scope:
        items.append(await anext(stream))

    assert scope.cancelled_caught
    gate.open()
    items += [item async for item in stream]
    assert items == [0, 1]


async def test_map_that_was_given_up_on_ends_and_what_is_under_way_goes_on(
    serving: Serving, complaints: list[dict[str, Any]]
) -> None:
    engine = await listen(complaints)
    gate = Gate()
    handle = serving(Model, gate)
    values = []

    with anyio.move_on_after(0.05):
        async for value in handle.map(range(100), max_in_flight=10):
            values.append(value)

    assert values == []
    gate.open()
    await wait_until(lambda: gate.passed == 10 and not engine.pending)


async def test_group_that_fails_cancels_what_waits_in_it_only(
    serving: Serving, complaints: list[dict[str, Any]]
) -> None:
    await listen(complaints)
    gate, open_gate = Gate(), Gate()
    open_gate.open()
    slow, failing = serving(Model, gate), serving(Model, open_gate)
    refs = [await slow.remote(x) for x in range(3)]

    async def wait(awaitable: Awaitable[Any]) -> None:
        await awaitable

    async def wait_for_all() -> None:
        async with anyio.create_task_group() as group:
            for ref in refs:
                group.start_soon(wait, ref)
            group.start_soon(wait, failing.fail.call())

    with pytest.raises(ExceptionGroup) as caught:
        await wait_for_all()

    (error,) = caught.value.exceptions
    assert isinstance(error, KeyError)
    gate.open()
    assert await asyncio.gather(*refs) == [0, 1, 2]


async def test_shielded_wait_outlives_the_scope_around_it(serving: Serving, complaints: list[dict[str, Any]]) -> None:
    await listen(complaints)
    gate = Gate()
    ref = await serving(Model, gate).remote(1)

    with anyio.CancelScope() as scope:
        scope.cancel()
        gate.open()
        with anyio.CancelScope(shield=True):
            assert await ref == 1
    assert not scope.cancelled_caught


async def test_thousands_of_given_up_waits_leave_nothing_behind(
    serving: Serving, complaints: list[dict[str, Any]]
) -> None:
    engine = await listen(complaints)
    gate = Gate()
    ref = await serving(Model, gate).remote(1)
    tasks = len(asyncio.all_tasks())

    for _ in range(2000):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await ref

    assert watchers_of(ref) == 0
    assert len(asyncio.all_tasks()) == tasks
    assert len(engine.pending) == 1
    gate.open()
    assert await ref == 1
