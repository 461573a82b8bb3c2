"""Handles and refs in every place people use them: threads, notebooks, inside deployments, and where there is no loop."""

import ast
import asyncio
import concurrent.futures
import inspect
import warnings
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio.to_thread
import pytest

import millstream
from millstream.errors import GetTimeoutError
from millstream.handles import engines
from millstream.handles.handle import DeploymentHandle, SyncHandle
from millstream.handles.ref import ObjectRef
from tests.replica_helpers import Gate, Serving


class Model:
    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate or Gate()

    async def __call__(self, x: Any = None) -> Any:
        return x

    async def held(self, x: Any = None) -> Any:
        await self._gate.wait()
        return x

    async def fail(self, text: str) -> None:
        raise ValueError(text)


@pytest.fixture
def elsewhere(serving: Serving) -> Iterator[Serving]:
    """Serves on another loop and thread: what blocks the first one does not block what it calls."""
    other = Serving(engines.settings())
    other._apps = 100  # other names
    yield other
    other.close()


# threads


def test_thirty_two_threads_share_one_handle(serving: Serving) -> None:
    handle = serving.sync(Model, replicas=2)

    def work(thread: int) -> list[Any]:
        refs = [handle.remote((thread, x)) for x in range(10)]
        called = [handle.call((thread, x)) for x in range(10)]
        ready, rest = millstream.wait(refs, num_returns=10, timeout=10)
        with pytest.raises(ValueError, match=f"of thread {thread}"):
            handle.fail.call(f"of thread {thread}")
        mapped = list(handle.map([(thread, x) for x in range(10)], max_in_flight=3))
        assert rest == [] and millstream.get(ready) == called == mapped
        return called

    with concurrent.futures.ThreadPoolExecutor(32) as threads:
        results = list(threads.map(work, range(32)))

    assert results == [[(thread, x) for x in range(10)] for thread in range(32)]


def test_thread_that_gives_up_takes_nothing_from_the_others(serving: Serving) -> None:
    gate = Gate()
    ref = serving.sync(Model, gate).held.remote(1)
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        patient = [threads.submit(ref.result, 10) for _ in range(8)]
        hasty = [threads.submit(ref.result, 0.05) for _ in range(8)]
        assert all(isinstance(one.exception(5), GetTimeoutError) for one in hasty)

        gate.open()

        assert [one.result(10) for one in patient] == [1] * 8


# notebooks: every cell is compiled to allow `await`, and runs as a task on a loop that never ends


class Notebook:
    """As ipykernel runs cells."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names

    async def run(self, cell: str) -> None:
        code = compile(cell, "<cell>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, self.names)
        if inspect.isawaitable(result):
            await result

    async def cell(self, source: str) -> list[str]:
        """Run a cell as a task of its own; the warnings that it shows."""
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            await asyncio.create_task(self.run(inspect.cleandoc(source)))
        return [str(one.message) for one in shown]


@pytest.mark.anyio
async def test_cells_of_a_notebook_may_block_and_are_told_so_once_for_each_way(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_warned", set())
    serving(Model)
    notebook = Notebook({"millstream": millstream, "sync": SyncHandle("Model", "app"), "said": []})
    ways = {
        "said.append(sync.call(1))": "SyncHandle.call()",
        "ref = sync.remote(1); said.append(ref.result())": "SyncHandle.remote()",
        "said += millstream.get([ref])": "millstream.get()",
        "said.append(millstream.wait([ref])[0][0].result(5))": "millstream.wait()",
        "said += list(sync.map([1]))": "SyncHandle.map()",
        "said.append(millstream.ObjectRef.from_id(ref.id).result())": "ref.result()",
        "ref.status()": "ref.status()",
    }
    warned: list[str] = []

    for way in ways:
        for _ in range(2):
            warned += await notebook.cell(way)

    assert notebook.names["said"] == [1] * 12
    assert [one.partition(" blocks the running event loop")[0] for one in warned] == list(ways.values())
    assert all("write `await" in one or "write `async for" in one for one in warned)


@pytest.mark.anyio
async def test_cells_of_a_notebook_share_handles_and_refs_and_mix_both_kinds(serving: Serving) -> None:
    gate = Gate()
    serving(Model, gate)
    notebook = Notebook(
        {
            "handle": DeploymentHandle("Model", "app"),
            "sync": SyncHandle("Model", "app"),
            "gate": gate,
            "asyncio": asyncio,
        }
    )

    await notebook.cell("task = handle.held.remote(1); ref = sync.held.remote(2)")
    await notebook.cell("first = await task; both = asyncio.gather(first, ref)")
    await notebook.cell("background = asyncio.ensure_future(asyncio.wait([first, ref])); gate.open()")
    await notebook.cell(
        """
        done, _ = await background
        values = await both
        mapped = [x async for x in handle.map(range(3))]
        blocking = ref.result() + sync.call(10) + sum(sync.map(range(4)))
        """
    )

    assert notebook.names["values"] == [1, 2]
    assert len(notebook.names["done"]) == 2
    assert notebook.names["mapped"] == [0, 1, 2]
    assert notebook.names["blocking"] == 2 + 10 + 6


@pytest.mark.anyio
async def test_error_in_a_cell_is_that_of_the_deployment(serving: Serving) -> None:
    serving(Model)
    notebook = Notebook({"handle": DeploymentHandle("Model", "app")})

    with pytest.raises(ValueError, match="bad input"):
        await notebook.cell("await handle.fail.call('bad input')")


# inside deployments


class Everywhere:
    """Calls another deployment in its constructor, when it is configured, and in every kind of method."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle, self.sync = handle, SyncHandle(handle.deployment_name, handle.app_name)
        self.seen = [self.sync.call("constructed"), self.sync.remote("by ref").result(5)]
        self.early = handle.remote("sent by the constructor")

    def reconfigure(self, user_config: Any) -> None:
        self.seen.append(self.sync.call(user_config))

    async def what_was_seen(self) -> list[Any]:
        return [*self.seen, await (await self.early)]

    async def on_the_loop(self, x: Any) -> Any:
        ref = await self.handle.remote(x)
        mapped = [value async for value in self.handle.map([x])]
        return [await ref, await self.handle.call(x), *mapped]

    def in_a_thread(self, x: Any) -> Any:
        return [self.sync.remote(x).result(5), self.sync.call(x), *self.sync.map([x])]

    def with_a_loop_of_its_own(self, x: Any) -> Any:
        return asyncio.run(self.on_the_loop(x))

    async def blocking_the_loop(self, x: Any) -> Any:
        ref = await self.handle.remote(x)
        return [millstream.get(ref), self.sync.call(x), *self.sync.map([x])]

    async def through_a_thread(self, x: Any) -> Any:
        return await asyncio.to_thread(self.in_a_thread, x)

    async def items(self, x: Any) -> AsyncIterator[Any]:
        for _ in range(3):
            yield await self.handle.call(x)

    def items_in_a_thread(self, x: Any) -> Iterator[Any]:
        for _ in range(3):
            yield self.sync.call(x)


class AsyncConstructor:
    async def __init__(self, handle: DeploymentHandle) -> None:  # type: ignore[misc] # Ray's way to await while loading
        self.seen = [await handle.call("awaited"), await (await handle.remote("by ref"))]

    async def reconfigure(self, user_config: Any) -> None:
        self.seen.append(user_config)

    async def __call__(self) -> list[Any]:
        return self.seen


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:.*blocks the running event loop")
@pytest.mark.parametrize(
    "method", ["on_the_loop", "in_a_thread", "with_a_loop_of_its_own", "blocking_the_loop", "through_a_thread"]
)
async def test_methods_of_every_kind_call_other_deployments(serving: Serving, elsewhere: Serving, method: str) -> None:
    handle = serving(Everywhere, elsewhere(Model))

    results = await asyncio.gather(*[handle.options(method_name=method).call(x) for x in range(5)])

    assert results == [[x] * 3 for x in range(5)]


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:.*blocks the running event loop")
@pytest.mark.parametrize("method", ["items", "items_in_a_thread"])
async def test_generators_call_other_deployments(serving: Serving, elsewhere: Serving, method: str) -> None:
    handle = serving(Everywhere, elsewhere(Model))

    assert [item async for item in handle.options(method_name=method).stream(1)] == [1] * 3


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:.*blocks the running event loop")
async def test_constructors_call_other_deployments(serving: Serving, elsewhere: Serving) -> None:
    inner = elsewhere(Model)

    handle = serving(Everywhere, inner, user_config="configured")
    awaiting = serving(AsyncConstructor, inner, user_config="configured")

    seen = await handle.what_was_seen.call()
    assert seen == ["constructed", "by ref", "configured", "sent by the constructor"]
    assert await awaiting.call() == ["awaited", "by ref", "configured"]


# where there is no loop


def step(coroutine: Any) -> None:
    """Run a coroutine as far as it goes, as a loop does that is not asyncio's."""
    coroutine.send(None)


@pytest.mark.parametrize("is_known", [False, True])
def test_other_kinds_of_loops_are_told_what_to_do(serving: Serving, is_known: bool) -> None:
    gate = Gate()
    ref = serving.sync(Model, gate).held.remote(1)
    ref = ref if is_known else ObjectRef.from_id(ref.id)
    handle = DeploymentHandle("Model", "app")

    async def await_ref() -> Any:
        return await ref

    async def await_call() -> Any:
        return await handle.call(1)

    async def iterate() -> Any:
        return [x async for x in handle.stream(1)]

    async def look() -> Any:
        ref.add_done_callback(print)

    for function in (await_ref, await_call, iterate, look):
        with pytest.raises(RuntimeError, match=r"no asyncio event loop.*trio.*SyncHandle and ref\.result\(\)"):
            step(function())
    gate.open()
    assert ref.result(5) == 1


@pytest.mark.anyio
async def test_wait_in_a_thread_of_anyio_can_be_left(serving: Serving) -> None:
    gate = Gate()
    handle = serving.sync(Model, gate)

    with anyio.move_on_after(0.1) as scope:
        await anyio.to_thread.run_sync(handle.held.call, 1, abandon_on_cancel=True)

    assert scope.cancelled_caught
    gate.open()
