"""Refs: awaited, waited for and read, in any loop, thread and process, as often as one likes."""

import asyncio
import concurrent.futures
import os
import pickle
import subprocess
import sys
import threading
import time
from typing import Any

import anyio
import anyio.to_thread
import pytest

from millstream.config import Settings
from millstream.errors import GetTimeoutError, RefNotFoundError
from millstream.handles import engines
from millstream.handles.handle import DeploymentHandle
from millstream.handles.ref import ObjectRef
from millstream.handles.waiting import get, put
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Serving
from tests.timing import timed

UNKNOWN = "app.Model~" + "u" * 22


class Model:
    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate or Gate()

    async def __call__(self, x: Any = None) -> Any:
        await self._gate.wait()
        return x

    async def fail(self) -> None:
        await self._gate.wait()
        raise KeyError("x")

    async def prompt(self, x: Any = None) -> Any:
        return x


async def remote(handle: DeploymentHandle, x: Any) -> ObjectRef:
    return await handle.remote(x)


async def value_of(ref: ObjectRef) -> Any:
    return await ref


# as values


def test_ref_is_equal_and_hashed_by_its_id() -> None:
    ref = ObjectRef.from_id(UNKNOWN)

    assert ref == ObjectRef.from_id(UNKNOWN) and hash(ref) == hash(ObjectRef.from_id(UNKNOWN))
    assert ref != ObjectRef.from_id("app.Model~" + "v" * 22) and ref != UNKNOWN
    assert (ref.id, ref.hex(), repr(ref)) == (UNKNOWN, UNKNOWN, f"ObjectRef({UNKNOWN})")


def test_ref_pickles_as_its_id() -> None:
    ref = ObjectRef.from_id(UNKNOWN)

    assert pickle.loads(pickle.dumps(ref)) == ref
    assert len(pickle.dumps(ref)) < 120


@pytest.mark.parametrize("text", ["", "x", "app.Model", "app.Model~short", "app~" + "u" * 22, UNKNOWN + "u"])
def test_text_that_is_no_ref_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a ref id"):
        ObjectRef.from_id(text)


# awaited


@pytest.mark.anyio
async def test_ref_can_be_awaited_again_and_by_several_at_once(serving: Serving) -> None:
    gate = Gate()
    ref = await serving(Model, gate).remote([1])
    waiting = [asyncio.create_task(value_of(ref)) for _ in range(3)]
    await asyncio.sleep(0)

    gate.open()

    values = await asyncio.gather(*waiting)
    assert values == [[1]] * 3
    assert await ref is values[0]


@pytest.mark.anyio
async def test_gather_takes_refs(serving: Serving) -> None:
    handle = serving(Model).prompt
    refs = [await handle.remote(x) for x in range(3)]

    assert await asyncio.gather(*refs) == [0, 1, 2]


@pytest.mark.anyio
async def test_wait_for_gives_up_on_the_ref_and_not_on_the_request(serving: Serving) -> None:
    gate = Gate()
    ref = await serving(Model, gate).remote(1)

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ref, 0.05)
    gate.open()

    assert await asyncio.wait_for(ref, 5) == 1


@pytest.mark.anyio
async def test_as_completed_takes_refs(serving: Serving) -> None:
    handle = serving(Model).prompt
    refs = [await handle.remote(x) for x in range(3)]

    assert {await one for one in asyncio.as_completed(refs)} == {0, 1, 2}


@pytest.mark.anyio
async def test_asyncio_wait_returns_the_refs_themselves(serving: Serving) -> None:
    gate = Gate()
    handle = serving(Model, gate)
    slow, quick = await handle.remote(1), await handle.prompt.remote(2)

    done, pending = await asyncio.wait([slow, quick], return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]

    assert (done, pending) == ({quick}, {slow})
    gate.open()
    done, pending = await asyncio.wait([slow, quick])  # type: ignore[type-var]
    assert (done, pending) == ({slow, quick}, set())


@pytest.mark.anyio
async def test_asyncio_wait_stops_at_the_first_failure_on_request(serving: Serving) -> None:
    gate, open_gate = Gate(), Gate()
    open_gate.open()
    slow, failing = await serving(Model, gate).remote(1), await serving(Model, open_gate).fail.remote()

    done, pending = await asyncio.wait([slow, failing], return_when=asyncio.FIRST_EXCEPTION)  # type: ignore[type-var]

    assert (done, pending) == ({failing}, {slow})
    gate.open()


@pytest.mark.anyio
async def test_asyncio_wait_keeps_its_timeout(serving: Serving) -> None:
    gate = Gate()
    ref = await serving(Model, gate).remote(1)

    done, pending = await asyncio.wait([ref], timeout=0.05)  # type: ignore[type-var]

    assert (done, pending) == (set(), {ref})
    gate.open()
    assert await ref == 1


@pytest.mark.anyio
async def test_done_callback_is_called_in_the_loop_with_the_ref(serving: Serving) -> None:
    gate = Gate()
    ref = await serving(Model, gate).remote(1)
    called: list[Any] = []
    ref.add_done_callback(lambda ref: called.append((ref, asyncio.get_running_loop())))

    gate.open()

    await wait_until(lambda: called == [(ref, asyncio.get_running_loop())])


@pytest.mark.anyio
async def test_state_of_a_ref_before_and_after_its_end(serving: Serving) -> None:
    gate = Gate()
    handle = serving(Model, gate)
    good, bad = await handle.remote(1), await handle.fail.remote()

    assert not good.done() and not good.cancelled()
    with pytest.raises(asyncio.InvalidStateError):
        good.exception()
    gate.open()

    await asyncio.wait([good, bad])  # type: ignore[type-var]
    assert good.done() and good.exception() is None
    assert bad.done() and isinstance(bad.exception(), KeyError)


# other loops


@pytest.mark.anyio
async def test_ref_can_be_awaited_in_a_loop_of_another_thread(serving: Serving) -> None:
    gate = Gate()
    ref = await serving(Model, gate).remote(1)
    elsewhere = asyncio.create_task(anyio.to_thread.run_sync(asyncio.run, value_of(ref)))
    await wait_until(lambda: gate.inside == 1)

    gate.open()

    assert await elsewhere == 1
    assert await ref == 1


def test_ref_outlives_the_loop_it_was_made_in(serving: Serving) -> None:
    gate = Gate()
    handle = serving(Model, gate)

    refs = [asyncio.run(remote(handle, x)) for x in range(2)]
    gate.open()

    assert asyncio.run(value_of(refs[0])) == 0
    assert refs[1].result(timeout=5) == 1


def test_ref_can_be_read_while_its_loop_stands_still(serving: Serving) -> None:
    gate = Gate()
    handle = serving(Model, gate)
    with asyncio.Runner() as runner:
        refs = [runner.run(remote(handle, x)) for x in range(3)]
        gate.open()

        assert refs[0].result(timeout=5) == 0
        assert asyncio.run(value_of(refs[1])) == 1
        assert get(refs, timeout=5) == [0, 1, 2]


def test_ref_that_was_cut_off_by_shutdown_can_be_read_after_it(serving: Serving, connected: Settings) -> None:
    gate = Gate()
    ref = serving.sync(Model, gate).remote(1)

    engines.close_all()
    gate.open()
    engines.use(connected)

    assert ref.result(timeout=5) == 1


# threads


@pytest.mark.parametrize("timeout", [None, 5, float("inf")])
def test_result_blocks_for_the_value(serving: Serving, timeout: float | None) -> None:
    gate = Gate()
    ref = serving.sync(Model, gate).remote(1)
    timer = threading.Timer(0.02, gate.open)
    timer.start()

    assert ref.result(timeout) == 1
    timer.join()


@timed
def test_result_that_takes_too_long_leaves_the_request_running(serving: Serving) -> None:
    gate = Gate()
    ref = serving.sync(Model, gate).remote(1)

    start = time.monotonic()
    for timeout in (0.05, 0, -1):
        with pytest.raises(GetTimeoutError, match="it goes on: ask again") as caught:
            ref.result(timeout)
    gate.open()

    assert caught.value.ref_id == ref.id and isinstance(caught.value, TimeoutError)
    assert 0.05 <= time.monotonic() - start < 1
    assert ref.result(5) == 1
    assert ref.result(0) == 1


@pytest.mark.anyio
async def test_ref_of_a_loop_can_be_read_in_a_thread_meanwhile(serving: Serving) -> None:
    gate = Gate()
    ref = await serving(Model, gate).remote(1)
    result = asyncio.create_task(anyio.to_thread.run_sync(ref.result))
    await wait_until(lambda: gate.inside == 1)

    gate.open()

    assert await result == 1


def test_future_of_a_ref_is_one_of_concurrent_futures(serving: Serving) -> None:
    gate = Gate()
    handle = serving.sync(Model, gate)
    good, bad = handle.remote(1).future(), handle.fail.remote().future()
    assert not good.cancel()

    gate.open()

    concurrent.futures.wait([good, bad], timeout=5)
    assert good.result(0) == 1
    assert isinstance(bad.exception(0), KeyError)


# elsewhere


@pytest.mark.anyio
async def test_unknown_ref_is_an_error_and_no_hang(serving: Serving) -> None:
    serving.deploy_only(Model)
    ref = ObjectRef.from_id(UNKNOWN)

    with pytest.raises(RefNotFoundError, match=f"ref {UNKNOWN} has no result here") as caught:
        await asyncio.wait_for(ref, 5)
    assert caught.value.ref_id == UNKNOWN
    assert isinstance(ref.exception(), RefNotFoundError)


def test_unknown_ref_is_an_error_for_blocking_readers_too(connected: Settings) -> None:
    with pytest.raises(RefNotFoundError):
        ObjectRef.from_id(UNKNOWN).result(timeout=5)
    with pytest.raises(RefNotFoundError):
        get([ObjectRef.from_id("gone.Deployment~" + "u" * 22)], timeout=5)


@pytest.mark.anyio
async def test_ref_by_id_hears_of_the_end_of_a_running_request(serving: Serving) -> None:
    gate = Gate()
    ref = await serving(Model, gate).remote(1)
    again = ObjectRef.from_id(ref.id)
    waiting = asyncio.create_task(anyio.to_thread.run_sync(again.result, 5))  # of another engine, that of the threads
    await wait_until(lambda: again._engine is not None and not again._engine.unregistered)

    gate.open()

    assert await waiting == 1


@pytest.mark.parametrize("ends", ["before", "meanwhile"])
def test_ref_by_id_is_read_in_another_process(serving: Serving, connected: Settings, ends: str) -> None:
    gate = Gate()
    ref = serving.sync(Model, gate).remote({"x": 1})
    if ends == "before":
        gate.open()
        ref.result(5)
    script = (
        "import asyncio, millstream, sys\n"
        f"ref = millstream.ObjectRef.from_id({ref.id!r})\n"
        "print(ref.done(), flush=True)\n"
        "async def main(): print(await ref)\n"
        "asyncio.run(main())\n"
        "print(ref.result(5))\n"
    )

    with run_script(script, connected) as process:
        assert process.stdout is not None and process.stdout.readline() == "False\n"
        gate.open()
        rest, errors = process.communicate(timeout=20)

    assert (rest, errors) == ("{'x': 1}\n{'x': 1}\n", "")


def run_script(script: str, settings: Settings) -> "subprocess.Popen[str]":
    """Run a Python script as another process of this installation, with warnings as errors."""
    return subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", script],
        env={**os.environ, **settings.to_environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# put


@pytest.mark.anyio
async def test_value_that_was_put_is_read_by_its_ref_and_by_its_id(connected: Settings) -> None:
    ref = await anyio.to_thread.run_sync(put, {"weights": [1, 2]})

    assert await ref == {"weights": [1, 2]}
    assert await ObjectRef.from_id(ref.id) == {"weights": [1, 2]}
    assert await anyio.to_thread.run_sync(ref.result) == {"weights": [1, 2]}
    assert ref.id.startswith("put.")
