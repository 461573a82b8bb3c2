"""Deadlines: they count from submission, the server's clock decides, and whoever waits is told in time."""

import asyncio
import random
import time
from typing import Any

import anyio
import anyio.to_thread
import pytest

from millstream.broker import scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.states import State
from millstream.config import Settings
from millstream.errors import RequestTimeoutError
from millstream.handles import engines
from millstream.handles.handle import DeploymentHandle
from millstream.handles.ref import ObjectRef
from tests.handles.elsewhere import run_elsewhere
from tests.handles.held import TIMEOUT_S, Model, Notes, blocking, in_time
from tests.helpers import new_ref, read_state, request, wait_until
from tests.replica_helpers import Serving
from tests.timing import timed

pytestmark = pytest.mark.anyio


async def to_end(handle: DeploymentHandle, how: str, **options: Any) -> Any:
    """The end of a request, made and waited for in one of the ways."""
    handle = handle.options(**options)
    match how:
        case "call":
            return await handle.call("it")
        case "ref":
            return await handle.options(block_until="queued").remote("it").ref
        case "sync call":
            return await anyio.to_thread.run_sync(blocking(handle).call, "it")
        case "sync remote":
            return await anyio.to_thread.run_sync(blocking(handle).remote, "it")
        case _:
            return await handle.remote("it")


# wherever a request is


@pytest.mark.parametrize("how", ["call", "ref", "remote", "sync call", "sync remote"])
@timed
async def test_queued_request_times_out_and_is_never_started(
    serving: Serving, redis: Control, keys: DeploymentKeys, notes: Notes, how: str
) -> None:
    handle = serving(Model, notes, max_ongoing_requests=1)
    await handle.echo.call("connected")
    await handle.remote("first")

    with in_time() as caught:
        await to_end(handle, how, timeout_s=TIMEOUT_S)
    notes.gate.open()

    assert await handle.echo.call("after") == "after"
    assert notes.started == ["first"]
    assert await read_state(redis, keys, caught.value.ref_id[-22:]) in (State.TIMED_OUT, None)  # None: freed, as read


@pytest.mark.parametrize("state", [State.PARKED, State.DELAYED, State.RUNNING])
@timed
async def test_request_times_out_wherever_it_is(
    serving: Serving, redis: Control, keys: DeploymentKeys, notes: Notes, state: State
) -> None:
    handle = serving(Model, notes)
    first = await handle.remote("first")
    in_time_handle = handle.options(timeout_s=TIMEOUT_S)

    with in_time():
        match state:
            case State.PARKED:
                ref = await in_time_handle.take.remote(first)
            case State.DELAYED:
                ref = await in_time_handle.options(eta=time.time() + 60).remote("it")
            case _:
                ref = await in_time_handle.remote("it")
        assert await ref.astatus() is state
        await ref

    assert await read_state(redis, keys, ref.id[-22:]) is State.TIMED_OUT
    assert set(notes.started) - {"first"} == ({"it"} if state is State.RUNNING else set())


@timed
async def test_running_coroutine_is_cancelled_inside_with_what_it_has_sent(serving: Serving, notes: Notes) -> None:
    class Parent:
        def __init__(self, child: DeploymentHandle) -> None:
            self._child = child

        async def __call__(self) -> Any:
            return await self._child.call("child")

    handle = serving(Parent, serving(Model, notes))

    with in_time():
        await handle.options(timeout_s=TIMEOUT_S).call()

    await wait_until(lambda: notes.cancelled == ["child"])


@timed
async def test_running_thread_is_told(serving: Serving, notes: Notes) -> None:
    handle = serving(Model, notes)

    with in_time():
        await handle.options(timeout_s=TIMEOUT_S).told.call("it")

    await wait_until(lambda: notes.cancelled == [("it", True)])


@timed
async def test_request_that_waits_for_a_thread_is_never_started(serving: Serving, notes: Notes) -> None:
    handle = serving(Model, notes, max_ongoing_requests=5)
    await handle.deaf.remote("first")

    with in_time():
        await handle.options(timeout_s=TIMEOUT_S).deaf.call("waits for the thread")
    await wait_until(lambda: len(serving._hosted[0].replica._intake._executor.running) == 1)  # type: ignore[union-attr]
    notes.gate.open()

    assert await handle.whoami.call()
    assert notes.started == ["first"]


async def test_request_that_ends_in_time_is_left_alone(serving: Serving) -> None:
    handle = serving(Model).options(timeout_s=0.2)

    assert await handle.echo.call(1) == 1
    ref = await handle.echo.remote(2)
    await asyncio.sleep(0.3)

    assert await ref == 2
    assert await ref.astatus() is State.SUCCEEDED


async def test_request_either_times_out_or_ends_never_both(
    serving: Serving, redis: Control, keys: DeploymentKeys
) -> None:
    async def sleep(in_s: float) -> str:
        await asyncio.sleep(in_s)
        return "value"

    rng, seen = random.Random(7), set[Any]()
    handle = serving(sleep, name="Model")
    await handle.call(0)

    async def one() -> None:
        timeout_s = rng.uniform(0.01, 0.05)
        task = handle.options(timeout_s=timeout_s, block_until="queued").remote(timeout_s - rng.uniform(0, 0.01))
        ref = task.ref
        try:
            await task
            value = await asyncio.wait_for(ref, 5)
        except RequestTimeoutError:
            value = None
        state = await read_state(redis, keys, ref.id[-22:])
        seen.add((value, state))

    for _ in range(20):
        await asyncio.gather(*[one() for _ in range(10)])

    assert seen - {(None, None)} == {("value", State.SUCCEEDED), (None, State.TIMED_OUT)}  # None: it was not even sent


# replicas that were busy or gone


@timed
async def test_request_whose_time_passed_while_there_was_no_replica_is_never_started(
    serving: Serving, notes: Notes
) -> None:
    handle = serving.deploy_only(Model)

    with in_time():
        await handle.options(timeout_s=TIMEOUT_S).call("it")
    serving.start_replica(handle, Model, notes)

    assert await handle.echo.call("after") == "after"
    assert notes.started == []


async def test_request_that_nobody_has_expired_yet_is_not_started_either(
    serving: Serving, redis: Control, keys: DeploymentKeys, notes: Notes
) -> None:
    handle = serving.deploy_only(Model)
    ref, codec = new_ref(), engines.current().route(keys.tag).codec
    body = codec.seal("request", ref.encode(), b"\x80\x05)}\x86.", b"__call__")
    await run(redis, scripts.submit(keys, "", request(ref, extras='{"timeout_ms": 1}', body=body)))
    await asyncio.sleep(0.01)
    assert await read_state(redis, keys, ref) is State.QUEUED, "its caller is gone, and nobody sweeps"

    serving.start_replica(handle, Model, notes)

    await wait_until(lambda: _is(redis, keys, ref, State.TIMED_OUT), 0.8, "before the first sweep")
    assert notes.started == []


async def _is(redis: Control, keys: DeploymentKeys, ref: str, state: State) -> bool:
    return await run(redis, scripts.place(keys, ref)) is state


@pytest.mark.parametrize("state", [State.QUEUED, State.PARKED, State.DELAYED])
async def test_deadline_of_a_caller_that_is_gone_is_found_by_a_sweeper(
    serving: Serving, redis: Control, settings: Settings, keys: DeploymentKeys, notes: Notes, state: State
) -> None:
    handle = serving(Model, notes, max_ongoing_requests=1)
    first = await handle.remote("first")
    make = {
        State.QUEUED: "handle.remote('it')",
        State.PARKED: f"handle.take.remote(ObjectRef.from_id({first.id!r}))",
        State.DELAYED: "handle.options(eta=time.time() + 60).remote('it')",
    }
    code = f"""
        import os, time
        from millstream import ObjectRef, SyncHandle

        handle = SyncHandle("Model", "app").options(timeout_s=0.5, block_until="queued")
        print({make[state]}.id, flush=True)
        os._exit(0)
        """

    ref = (await run_elsewhere(settings, code)).stdout.strip()[-22:]

    await wait_until(lambda: _is(redis, keys, ref, State.TIMED_OUT), 5)
    notes.gate.open()
    assert await handle.echo.call("after") == "after"
    assert notes.started == ["first"]


# the deployment's own timeout


@timed
async def test_deployment_sets_a_timeout_for_who_sets_none(serving: Serving, notes: Notes) -> None:
    handle = serving(Model, notes, request_timeout_s=TIMEOUT_S)
    await handle.echo.call("connected")

    with in_time():
        await handle.call("it")

    await wait_until(lambda: notes.cancelled == ["it"])


@timed
async def test_deployments_timeout_of_what_is_queued_is_found_by_sweepers(serving: Serving, notes: Notes) -> None:
    handle = serving(Model, notes, request_timeout_s=TIMEOUT_S, max_ongoing_requests=1)
    await handle.options(timeout_s=60).remote("first")

    with in_time(slack_s=2):
        await handle.call("it")

    assert notes.started == ["first"]


@pytest.mark.parametrize("timeout_s", [0.1, 0.6])
@timed
async def test_callers_timeout_takes_the_place_of_the_deployments(
    serving: Serving, notes: Notes, timeout_s: float
) -> None:
    handle = serving(Model, notes, request_timeout_s=TIMEOUT_S)
    await handle.echo.call("connected")

    with in_time(timeout_s):
        await handle.options(timeout_s=timeout_s).call("it")


# who is told


@timed
async def test_dependants_fail_at_once_with_the_original_error(serving: Serving) -> None:
    handle = serving(Model)
    await handle.echo.call("connected")

    with in_time() as caught:
        upstream = handle.options(timeout_s=TIMEOUT_S).remote("it")
        await (await handle.take.remote(handle.take.remote(upstream)))

    assert caught.value.ref_id == upstream.ref.id


@timed
async def test_reader_that_has_the_id_only_is_told(serving: Serving) -> None:
    handle = serving(Model)
    await handle.echo.call("connected")

    with in_time():
        ref = await handle.options(timeout_s=TIMEOUT_S).remote("it")
        await anyio.to_thread.run_sync(ObjectRef.from_id(ref.id).result, 10)


@pytest.mark.parametrize("how", ["remote", "sync remote"])
async def test_request_that_a_replica_took_in_time_raises_at_its_ref(serving: Serving, how: str) -> None:
    handle = serving(Model)

    ref = await to_end(handle, how, timeout_s=TIMEOUT_S)

    with pytest.raises(RequestTimeoutError):
        await ref
