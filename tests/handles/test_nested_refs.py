"""Refs further down in the arguments: they arrive as refs, and can be read there in any way, whoever has gone meanwhile."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
import pytest

import millstream
from millstream.handles.ref import ObjectRef
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Serving


class Model:
    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate or Gate()

    async def __call__(self, *numbers: int) -> int:
        return sum(numbers) + 1

    async def held(self, x: Any) -> Any:
        await self._gate.wait()
        return x

    async def fail(self) -> None:
        raise KeyError("origin")


class Reader:
    """Reads the refs it finds in what it is given, in every way a method can."""

    async def awaits(self, tree: Any) -> Any:
        return await innermost(tree)

    async def awaits_for_itself(self, tree: Any) -> Any:
        return await asyncio.wait_for(innermost(tree), 5)

    def blocks(self, tree: Any) -> Any:
        return innermost(tree).result(5)

    def gets(self, tree: Any) -> Any:
        return millstream.get([innermost(tree)], timeout=5)[0]

    def passes_on(self, handle: Any, tree: Any) -> Any:
        return millstream.SyncHandle(handle.deployment_name, handle.app_name).call(innermost(tree))

    async def passes_on_later(self, handle: Any, tree: Any) -> Any:
        return await handle.call(innermost(tree))


@dataclass
class Box:
    content: Any


class Custom:
    def __init__(self, content: Any) -> None:
        self.content = content


def innermost(tree: Any) -> Any:
    while not isinstance(tree, ObjectRef):
        match tree:
            case Custom() | Box():
                tree = tree.content
            case dict():
                (tree,) = tree.values()
            case _:
                (tree,) = tree
    return tree


def ten_deep(value: Any) -> Any:
    wraps: list[Callable[[Any], Any]] = [
        lambda x: {x}, Custom, lambda x: frozenset([x]), lambda x: (x,), lambda x: {"k": x},
        lambda x: [x], Box, lambda x: {1: x}, lambda x: [x], Custom,
    ]  # fmt: skip
    for wrap in wraps:
        value = wrap(value)
    return value


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["awaits", "awaits_for_itself", "blocks", "gets"])
@pytest.mark.parametrize("is_task", [False, True])
@pytest.mark.anyio
async def test_ref_ten_levels_down_is_read_by_any_method(serving: Serving, method: str, is_task: bool) -> None:
    handle, reader = serving(Model), serving(Reader)
    upstream = handle.remote(1) if is_task else await handle.remote(1)

    assert await reader.options(method_name=method).call(ten_deep(upstream)) == 2


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["passes_on", "passes_on_later"])
@pytest.mark.anyio
async def test_ref_that_came_inside_is_an_argument_of_a_further_call(serving: Serving, method: str) -> None:
    handle, reader = serving(Model), serving(Reader)

    assert await reader.options(method_name=method).call(handle, [handle.remote(1)]) == 3


@pytest.mark.anyio
async def test_ref_inside_is_read_when_its_submitter_is_gone(serving: Serving) -> None:
    gate = Gate()
    handle, reader = serving(Model, gate), serving(Reader)

    async def start_and_leave() -> str:
        return (await reader.awaits.remote([handle.held.remote(7)])).id

    ref_id = await anyio.to_thread.run_sync(asyncio.run, start_and_leave())
    await wait_until(lambda: gate.inside == 1)
    gate.open()

    assert await asyncio.wait_for(ObjectRef.from_id(ref_id), 5) == 7


@pytest.mark.anyio
async def test_failure_of_a_ref_inside_is_met_where_it_is_read(serving: Serving) -> None:
    handle, reader = serving(Model), serving(Reader)

    for method in ("awaits", "blocks"):
        with pytest.raises(KeyError, match="origin"):
            await reader.options(method_name=method).call([handle.fail.remote()])


def test_blocking_callers_send_refs_inside_too(serving: Serving) -> None:
    handle, reader = serving.sync(Model), serving.sync(Reader)
    results: list[int] = []

    def call() -> None:
        results.append(reader.awaits.call(ten_deep(handle.remote(1))))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert results == [2] * 8


# tasks of one engine in requests of another


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:.*blocks the running event loop")
@pytest.mark.parametrize("is_connected", [False, True])
async def test_blocking_call_on_a_loop_takes_tasks_that_this_loop_has_not_sent_yet(
    serving: Serving, is_connected: bool
) -> None:
    """As in a notebook that uses both kinds of handles."""
    handle, reader = serving(Model), serving(Reader)
    sync = millstream.SyncHandle(handle.deployment_name, handle.app_name)
    if is_connected:
        await handle.call()

    assert sync.call(handle.remote(1)) == 3
    assert sync.call(handle.remote(handle.remote(1)), handle.remote(5)) == 3 + 6 + 1
    assert millstream.SyncHandle(reader.deployment_name, reader.app_name).blocks.call([handle.remote(1)]) == 2


def test_task_of_one_loop_is_an_argument_in_another(serving: Serving) -> None:
    handle = serving(Model)
    made, used = threading.Event(), threading.Event()
    tasks: list[Any] = []

    async def make() -> None:
        tasks.append(handle.remote(1))
        made.set()
        used.wait(5)  # it has no chance to be sent from here

    async def use() -> int:
        made.wait(5)
        result: int = await asyncio.wait_for(handle.call(tasks[0]), 5)
        used.set()
        return result

    maker = threading.Thread(target=lambda: asyncio.run(make()))
    maker.start()
    try:
        assert asyncio.run(use()) == 3
    finally:
        used.set()
        maker.join()
