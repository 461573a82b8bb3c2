"""Refs and un-awaited tasks as arguments: values at the top level, refs further down, and nobody waits in a slot."""

import asyncio
import re
import threading
import time
from dataclasses import dataclass
from typing import Any, cast

import anyio.to_thread
import pytest

import millstream
from millstream.broker import pickling
from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys
from millstream.config import Settings
from millstream.errors import (
    DeployFailedError,
    DeploymentNotFoundError,
    RefNotFoundError,
    RequestCancelledError,
    SerializationError,
    TaskError,
)
from millstream.handles import arguments
from millstream.handles.arguments import Later
from millstream.handles.handle import DeploymentHandle, SyncHandle
from millstream.handles.ref import ObjectRef
from tests.helpers import read_states, wait_until
from tests.replica_helpers import Gate, Serving

REF = ObjectRef.from_id("app.Model~" + "r" * 22)
OTHER = ObjectRef.from_id("app.Model~" + "s" * 22)


@dataclass
class Box:
    content: Any


class Model:
    """Adds, tells what it was given, waits, fails."""

    ran: list[Any]

    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate or Gate()
        Model.ran = []

    async def __call__(self, *numbers: int) -> int:
        return sum(numbers) + 1

    async def held(self, x: Any) -> Any:
        await self._gate.wait()
        return x

    async def fail(self, text: str) -> None:
        raise KeyError(text)

    async def fail_later(self, text: str) -> None:
        await self._gate.wait()
        raise KeyError(text)

    async def note(self, *args: Any, **kwargs: Any) -> Any:
        Model.ran.append((args, kwargs))
        return args, kwargs

    async def look(self, value: Any) -> str:
        inner = value["ref"] if isinstance(value, dict) else getattr(value, "content", None) or value[0]
        return f"{type(inner).__name__} of {await inner}"


# the pickled form


def test_refs_at_the_top_level_are_replaced_and_named() -> None:
    encoded = arguments.encode("a call", (1, REF), {"x": OTHER, "y": [REF]})

    args, kwargs = pickling.load(cast(bytes, encoded.body))
    assert (args, kwargs) == ((1, Later(REF.id)), {"x": Later(OTHER.id), "y": [REF]})
    assert encoded.depends_on == [REF, OTHER]
    assert arguments.fill_in(args, kwargs, {REF.id: "one", OTHER.id: "two"}) == ((1, "one"), {"x": "two", "y": [REF]})


def test_arguments_without_refs_are_as_they_were() -> None:
    encoded = arguments.encode("a call", (1, [2]), {"x": 3})

    assert pickling.load(cast(bytes, encoded.body)) == ((1, [2]), {"x": 3})
    assert (encoded.depends_on, encoded.mentions) == ([], [])


@pytest.mark.anyio
async def test_future_of_somebody_else_is_refused() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    for args in ((future,), ([future],)):
        with pytest.raises(SerializationError, match="await it first"):
            arguments.encode("a call", args, {})


# values and refs


@pytest.mark.anyio
async def test_task_and_ref_at_the_top_level_arrive_as_values(serving: Serving) -> None:
    handle = serving(Model)
    task = handle.remote(1)
    ref = await handle.remote(10)

    assert await handle.note.call(task, ref, 5, x=task, y=ref) == ((2, 11, 5), {"x": 2, "y": 11})
    assert await (await handle.note.remote(task)) == ((2,), {})


@pytest.mark.anyio
async def test_same_ref_twice_is_the_same_value_twice(serving: Serving) -> None:
    handle = serving(Model)
    task = handle.remote(1)

    assert await handle.note.call(task, task, x=task) == ((2, 2), {"x": 2})


def test_blocking_handle_takes_refs_too(serving: Serving) -> None:
    handle = serving.sync(Model)

    assert handle.call(handle.remote(1), handle.remote(2)) == 6
    assert handle.remote(millstream.put(5)).result() == 6


@pytest.mark.anyio
@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: {"ref": x}, lambda x: Box(x), lambda x: (x, 1)])
@pytest.mark.parametrize("is_task", [False, True])
async def test_ref_further_down_stays_a_ref_that_can_be_awaited_there(
    serving: Serving, wrap: Any, is_task: bool
) -> None:
    handle = serving(Model)
    upstream = handle.remote(1) if is_task else await handle.remote(1)

    assert await handle.look.call(wrap(upstream)) == "ObjectRef of 2"


@pytest.mark.anyio
async def test_value_that_was_put_is_an_argument_like_any_other(serving: Serving) -> None:
    ref = await anyio.to_thread.run_sync(millstream.put, {"weights": [1]})

    assert await serving(Model).note.call(ref, x=ref) == (({"weights": [1]},), {"x": {"weights": [1]}})


@pytest.mark.anyio
@pytest.mark.parametrize("size", [5000, 2_000_000])
async def test_large_value_arrives_as_an_argument(serving: Serving, size: int) -> None:
    handle = serving(Model)
    ref = await anyio.to_thread.run_sync(millstream.put, b"x" * size)

    (value,), _ = await handle.note.call(handle.note.remote(ref))

    assert value == ((b"x" * size,), {})


@pytest.mark.anyio
async def test_value_of_another_deployment_is_an_argument(serving: Serving) -> None:
    first, second = serving(Model), serving(Model)

    assert await second.call(first.remote(second.remote(1))) == 4


# graphs


@pytest.mark.anyio
async def test_chain_of_twenty_un_awaited_tasks(serving: Serving) -> None:
    handle = serving(Model)

    task = handle.remote(0)
    for _ in range(19):
        task = handle.remote(task)

    assert await (await task) == 20


@pytest.mark.anyio
async def test_chain_to_and_fro_between_deployments_that_were_never_called(serving: Serving) -> None:
    warm, cold, colder = serving(Model), serving(Model), serving(Model)
    assert await warm.call(0) == 1

    task = warm.remote(0)
    for handle in (cold, warm, colder, warm, cold, warm):
        task = handle.remote(task)

    assert await (await task) == 7


@pytest.mark.anyio
async def test_diamond(serving: Serving) -> None:
    handle = serving(Model)

    top = handle.remote(1)
    left, right = handle.remote(top), handle.remote(top, 10)

    assert await handle.call(left, right) == 3 + 13 + 1


@pytest.mark.anyio
async def test_fan_in_of_a_hundred(serving: Serving) -> None:
    handle = serving(Model, replicas=2)

    assert await handle.call(*[handle.remote(x) for x in range(100)]) == sum(range(1, 101)) + 1


@pytest.mark.anyio
async def test_fan_out_and_in_under_load_knows_every_nested_ref(serving: Serving) -> None:
    upstream, downstream = serving(Model, replicas=2), serving(Model)
    await downstream.call(0)

    calls = [downstream.look.call([upstream.remote(x)]) for x in range(500)]

    assert await asyncio.gather(*calls) == [f"ObjectRef of {x + 1}" for x in range(500)]


@pytest.mark.anyio
async def test_delayed_dependant_waits_for_both(serving: Serving) -> None:
    handle, start = serving(Model), time.monotonic()

    assert await handle.options(delay_s=0.1).call(handle.remote(1)) == 3
    assert time.monotonic() - start >= 0.1


def test_graph_runs_on_when_its_caller_is_gone(serving: Serving) -> None:
    gate = Gate()
    handle = serving(Model, gate)

    async def start_and_leave() -> str:
        last = handle.remote(handle.remote(handle.held.remote(1)))
        return (await last).id

    ref_id = asyncio.run(start_and_leave())
    gate.open()

    assert ObjectRef.from_id(ref_id).result(5) == 3


@pytest.mark.parametrize("inside", [False, True])
def test_end_of_a_loop_cancels_no_request_that_another_one_needs(serving: Serving, inside: bool) -> None:
    slow, handle = serving.deploy_only(Model), serving(Model)

    async def start_and_leave() -> str:
        upstream = slow.note.remote(1)  # nobody takes it before the loop, and with it this task, ends
        return (await handle.note.remote([upstream] if inside else upstream)).id

    ref_id = asyncio.run(start_and_leave())
    serving.start_replica(slow, Model)

    ((value,), _) = ObjectRef.from_id(ref_id).result(5)
    assert (value[0].result(5) if inside else value) == ((1,), {})


@pytest.mark.anyio
async def test_task_among_arguments_that_cannot_be_sent_still_cancels_its_request(serving: Serving) -> None:
    slow, handle = serving.deploy_only(Model), serving(Model)
    task = slow.note.remote(1)

    with pytest.raises(SerializationError):
        await handle.note.remote(task, threading.Lock())

    task.cancel()
    with pytest.raises(RequestCancelledError):
        await asyncio.wait_for(task.ref, 5)


# waiting


@pytest.mark.anyio
async def test_request_whose_argument_is_not_there_yet_holds_no_slot(
    serving: Serving, redis: Control, keys: DeploymentKeys
) -> None:
    gate = Gate()
    slow = serving.deploy_only(Model)
    handle = serving(Model, max_ongoing_requests=1)
    upstream = slow.held.remote(1)

    parked = await handle.remote(upstream)  # matched: it is parked

    assert await asyncio.wait_for(asyncio.gather(*[handle.call(x) for x in range(10)]), 5) == list(range(1, 11))
    state = read_states(redis, DeploymentKeys("ms", f"{handle.app_name}.Model"), [parked.id.partition("~")[2]])
    assert await state == ["parked"]
    serving.start_replica(slow, Model, gate)
    gate.open()
    assert await parked == 2


# failures


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["fail", "fail_later"])
async def test_failed_argument_fails_the_request_with_the_original_error_unrun(serving: Serving, method: str) -> None:
    gate = Gate()
    handle = serving(Model, gate)
    upstream = handle.options(method_name=method).remote("origin")
    downstream = handle.note.remote(handle.note.remote(1, upstream), x=2)
    ref = await downstream

    gate.open()

    with pytest.raises(KeyError, match="origin") as caught:
        await asyncio.wait_for(ref, 5)
    assert isinstance(caught.value, TaskError) and "raise KeyError(text)" in str(caught.value)
    assert Model.ran == []


@pytest.mark.anyio
async def test_failed_argument_does_not_wait_for_the_others(serving: Serving) -> None:
    gate = Gate()
    handle = serving(Model, gate)

    with pytest.raises(KeyError, match="at once"):
        await asyncio.wait_for(handle.note.call(handle.held.remote(1), handle.fail.remote("at once")), 5)
    gate.open()


@pytest.mark.anyio
async def test_unknown_ref_as_an_argument_fails_the_request(serving: Serving) -> None:
    with pytest.raises(RefNotFoundError, match=re.escape(REF.id)):
        await serving(Model).call(REF)


@pytest.mark.anyio
@pytest.mark.parametrize("refused", ["submitted", "parked", "long ago"])
async def test_argument_that_was_refused_fails_the_request_with_the_reason(serving: Serving, refused: str) -> None:
    handle, nobody = serving(Model), DeploymentHandle("Nobody", "app")

    upstream = nobody.remote(1 if refused != "parked" else handle.remote(1))
    if refused == "long ago":
        await asyncio.wait([upstream])

    with pytest.raises(DeploymentNotFoundError, match="'Nobody'"):
        await asyncio.wait_for(handle.call(handle.remote(upstream)), 5)


def test_argument_that_was_refused_fails_the_requests_of_threads_too(serving: Serving, connected: Settings) -> None:
    handle = serving.sync(Model)
    unknown = ObjectRef.from_id("app.Nobody~" + "u" * 22)

    with pytest.raises(RefNotFoundError):
        handle.call(unknown)
    with pytest.raises(DeploymentNotFoundError):
        SyncHandle("Nobody", "app").remote(handle.remote(1))


@pytest.mark.anyio
async def test_argument_of_a_deployment_that_cannot_start_fails_the_request(
    serving: Serving, redis: Control, keys: DeploymentKeys
) -> None:
    broken, handle = serving.deploy_only(Model), serving(Model)
    future = handle.call(broken.remote(1))
    await wait_until(lambda: _has(redis, keys.open))

    status: dict[Any, Any] = {"state": "DEPLOY_FAILED", "message": "no GPU"}
    await redis.hset(keys.status, mapping=status)

    with pytest.raises(DeployFailedError, match="no GPU"):
        await asyncio.wait_for(future, 5)


async def _has(redis: Control, key: str) -> bool:
    return bool(await redis.exists(key))
