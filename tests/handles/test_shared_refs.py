"""One request, waited for by many: several refs of its id, several loops and threads, of which some end before it does."""

import asyncio
import concurrent.futures
import gc
import threading
from collections.abc import Callable
from typing import Any

import anyio.to_thread
import pytest

from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys, split_ref
from millstream.broker.states import State
from millstream.config import Settings
from millstream.errors import GetTimeoutError, RefNotFoundError
from millstream.handles import engines
from millstream.handles.handle import DeploymentHandle
from millstream.handles.ref import ObjectRef
from millstream.handles.waiting import get, wait
from tests.handles.test_ref import run_script
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Serving


class Model:
    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate or Gate()

    async def __call__(self, x: Any = None) -> Any:
        await self._gate.wait()
        return x

    async def fail(self) -> None:
        await self._gate.wait()
        raise KeyError("x")


async def value_of(ref: ObjectRef) -> Any:
    return await ref


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    def run(self, coroutine: Any) -> "concurrent.futures.Future[Any]":
        return self._thread.submit(self._runner.run, coroutine)

    def close(self) -> None:
        self._thread.submit(self._runner.close).result(5)
        self._thread.shutdown()


# several refs of one id


@pytest.mark.anyio
async def test_refs_of_one_id_are_all_told(serving: Serving) -> None:
    gate = Gate()
    ref = await serving(Model, gate).remote([1])
    others = [ObjectRef.from_id(ref.id) for _ in range(3)]
    waiting = asyncio.gather(ref, *others, ref)
    await asyncio.sleep(0.02)
    late = ObjectRef.from_id(ref.id)

    gate.open()

    assert await waiting == [[1]] * 5
    assert await late == [1]


@pytest.mark.anyio
async def test_refs_of_one_failed_request_all_raise(serving: Serving) -> None:
    gate = Gate()
    ref = await serving(Model, gate).fail.remote()
    refs = [ref, *[ObjectRef.from_id(ref.id) for _ in range(3)]]
    waiting = asyncio.gather(*[value_of(one) for one in refs], return_exceptions=True)
    await asyncio.sleep(0.02)

    gate.open()

    errors = await waiting
    assert [type(error).__name__ for error in errors] == ["TaskError(KeyError)"] * 4
    assert len(set(map(id, errors))) == 4, "each has its own, with its own traceback"


@pytest.mark.anyio
async def test_asking_again_and_again_by_id_costs_no_memory_and_tells_everybody(serving: Serving) -> None:
    """As a web server does, whose every request looks whether a job of somebody's is done."""
    gate = Gate()
    ref = await serving(Model, gate).remote(1)
    ref_id = ref.id
    waiting = asyncio.create_task(value_of(ObjectRef.from_id(ref_id)))
    for _ in range(3000):
        assert not ObjectRef.from_id(ref_id).done()
        await asyncio.sleep(0)

    assert len(engines.current().pending) == 1
    gate.open()
    assert await asyncio.wait_for(waiting, 5) == 1
    assert await ref == 1


def test_asking_again_and_again_by_id_in_threads(serving: Serving) -> None:
    gate = Gate()
    ref = serving.sync(Model, gate).remote(1)
    asked: list[bool] = []

    def ask() -> None:
        for _ in range(200):
            again = ObjectRef.from_id(ref.id)
            asked.append(again.done())
            with pytest.raises(GetTimeoutError):
                again.result(0)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert asked == [False] * 800
    assert len(engines.background().engine.pending) == 1
    gate.open()
    assert ObjectRef.from_id(ref.id).result(5) == 1


@pytest.mark.anyio
async def test_ref_dropped_while_another_of_its_id_waits_takes_nothing_away(serving: Serving) -> None:
    gate = Gate()
    first = await serving(Model, gate).remote(1)
    other = ObjectRef.from_id(first.id)
    waiting = asyncio.create_task(value_of(other))
    await asyncio.sleep(0.02)
    del first
    gc.collect()

    gate.open()

    assert await asyncio.wait_for(waiting, 5) == 1
    assert await ObjectRef.from_id(other.id) == 1


# several loops and threads


def test_ref_is_read_by_many_threads_at_once(serving: Serving) -> None:
    gate = Gate()
    ref = serving.sync(Model, gate).remote({"x": [1]})
    with concurrent.futures.ThreadPoolExecutor(32) as threads:
        results = [threads.submit(ref.result, 5) for _ in range(32)]

        gate.open()

        assert [one.result(10) for one in results] == [{"x": [1]}] * 32


def test_id_is_followed_from_loops_and_threads_at_once(serving: Serving) -> None:
    gate = Gate()
    ref = serving.sync(Model, gate).remote(1)
    loops = [Loop() for _ in range(4)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        waiting = [loop.run(value_of(one)) for loop in loops for one in (ObjectRef.from_id(ref.id),)]
        waiting += [threads.submit(ObjectRef.from_id(ref.id).result, 10) for _ in range(8)]

        gate.open()

        assert [one.result(10) for one in waiting] == [1] * 12
    for loop in loops:
        loop.close()


def test_same_ref_is_awaited_in_several_loops_at_once(serving: Serving) -> None:
    gate = Gate()
    handle = serving(Model, gate)
    loops = [Loop() for _ in range(4)]

    async def make() -> ObjectRef:
        return await handle.remote(1)

    ref = loops[0].run(make()).result(5)
    waiting = [loop.run(value_of(ref)) for loop in loops]
    gate.open()

    assert [one.result(10) for one in waiting] == [1] * 4
    for loop in loops:
        loop.close()


def blocking_result(ref: ObjectRef) -> Any:
    return ref.result(10)


def blocking_get(ref: ObjectRef) -> Any:
    return get([ref], timeout=10)[0]


def blocking_wait(ref: ObjectRef) -> Any:
    (ready,), _ = wait([ref], timeout=10)
    return ready.result(0)


def blocking_future(ref: ObjectRef) -> Any:
    return ref.future().result(10)


@pytest.mark.parametrize("block", [blocking_result, blocking_get, blocking_wait, blocking_future])
@pytest.mark.parametrize("how", ["ends", "stands still"])
def test_thread_that_waits_for_a_ref_outlives_the_loop_it_was_made_in(
    serving: Serving, block: Callable[[ObjectRef], Any], how: str
) -> None:
    gate = Gate()
    handle = serving(Model, gate)
    loop = Loop()
    with concurrent.futures.ThreadPoolExecutor(1) as threads:

        async def make_and_leave() -> "concurrent.futures.Future[Any]":
            ref = await handle.remote(1)
            waiting = threads.submit(block, ref)
            await asyncio.sleep(0.05)  # it has begun to wait
            return waiting

        waiting = loop.run(make_and_leave()).result(5)
        if how == "ends":
            loop.close()
        gate.open()

        assert waiting.result(10) == 1
    if how != "ends":
        loop.close()


def test_loop_that_waits_for_a_ref_outlives_the_loop_it_was_made_in(serving: Serving) -> None:
    gate = Gate()
    handle = serving(Model, gate)
    first, second = Loop(), Loop()

    async def make() -> ObjectRef:
        return await handle.remote(1)

    async def make_and_share() -> "concurrent.futures.Future[Any]":
        waiting = second.run(value_of(await handle.remote(1)))
        await asyncio.sleep(0.05)
        return waiting

    waiting = first.run(make_and_share()).result(5)
    first.close()
    gate.open()

    assert waiting.result(10) == 1
    second.close()


@pytest.mark.anyio
async def test_future_made_on_a_loop_is_for_threads(serving: Serving) -> None:
    gate = Gate()
    future = (await serving(Model, gate).remote(1)).future()
    waiting = asyncio.create_task(anyio.to_thread.run_sync(future.result, 5))
    await wait_until(lambda: gate.inside == 1)

    gate.open()

    assert await waiting == 1
    assert await asyncio.wrap_future(future) == 1


# expired, unknown, pending


@pytest.mark.anyio
async def test_pending_expired_and_unknown_are_told_apart(serving: Serving, redis: Control) -> None:
    gate = Gate()
    handle = serving(Model, gate)
    pending = await handle.remote(1)
    unknown = ObjectRef.from_id(f"{handle.app_name}.Model~" + "u" * 22)
    expired = await serving(Model, _opened()).remote(2)
    assert await expired == 2
    tag, local = split_ref(expired.id)
    await redis.delete(DeploymentKeys("ms", tag).result(local))
    expired_too = ObjectRef.from_id(expired.id)

    assert await pending.astatus() == State.RUNNING and not ObjectRef.from_id(pending.id).done()
    for ref in (unknown, expired_too):
        with pytest.raises(RefNotFoundError, match=ref.id):
            await asyncio.wait_for(ref, 5)
        with pytest.raises(RefNotFoundError, match=ref.id):
            await ref.astatus()
        assert ref.done() and isinstance(ref.exception(), RefNotFoundError)
    assert await expired == 2, "who has read it keeps it"
    gate.open()


def _opened() -> Gate:
    gate = Gate()
    gate.open()
    return gate


# other processes


def test_ref_is_read_here_when_the_process_that_made_it_has_gone(serving: Serving, connected: Settings) -> None:
    gate = Gate()
    handle = serving(Model, gate)
    script = (
        "import asyncio\n"
        "from millstream import serve\n"
        f"handle = serve.get_deployment_handle({handle.deployment_name!r}, {handle.app_name!r})\n"
        "async def main():\n"
        "    print((await handle.remote({'x': 1})).id)\n"
        "asyncio.run(main())\n"
    )
    with run_script(script, connected) as producer:
        printed, errors = producer.communicate(timeout=20)
    assert errors == ""

    ref = ObjectRef.from_id(printed.strip())
    assert ref.status() == State.RUNNING
    gate.open()

    assert ref.result(5) == {"x": 1}


def test_same_handle_and_ref_in_several_loops_of_several_threads(serving: Serving) -> None:
    gate = _opened()
    handle: DeploymentHandle = serving(Model, gate, replicas=2)
    shared = asyncio.run(_remote(handle, "shared"))

    async def work(number: int) -> list[Any]:
        refs = [await handle.remote((number, x)) for x in range(20)]
        values = await asyncio.gather(*refs, *[handle.call((number, x)) for x in range(20)], shared)
        return list(values)

    loops = [Loop() for _ in range(6)]
    results = [loop.run(work(number)) for number, loop in enumerate(loops)]

    for number, result in enumerate(results):
        assert result.result(20) == [(number, x) for x in range(20)] * 2 + ["shared"]
    for loop in loops:
        loop.close()


async def _remote(handle: DeploymentHandle, x: Any) -> ObjectRef:
    return await handle.remote(x)
