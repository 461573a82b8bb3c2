"""Results that nobody can ask for any more are deleted, those that somebody may ask for are not."""

import asyncio
import gc
import pickle
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread
import pytest

from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys
from millstream.errors import RequestCancelledError, RequestTimeoutError
from millstream.handles import engines
from millstream.handles.cell import Cell
from millstream.handles.handle import DeploymentHandle
from millstream.handles.ref import ObjectRef
from tests.handles.held import Notes, blocking
from tests.handles.ledger import LARGE, Ledger, is_clean, left, passes
from tests.helpers import wait_until
from tests.replica_helpers import Serving

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]

# freed


def dropped(ref: ObjectRef) -> None:
    """The caller's reference is the last one."""


async def by_call(handle: DeploymentHandle) -> None:
    assert await handle.call(1) == 1


async def by_map(handle: DeploymentHandle) -> None:
    assert [value async for value in handle.map(range(50))] == list(range(50))


async def by_map_as_completed(handle: DeploymentHandle) -> None:
    assert {value async for value in handle.map(range(50), ordered=False)} == set(range(50))


async def by_refs_of_a_map(handle: DeploymentHandle) -> None:
    for ref in await handle.map_refs(range(50)):
        await ref


async def by_unread_refs_of_a_map(handle: DeploymentHandle) -> None:
    await handle.map_refs(range(50))


async def by_awaited_ref(handle: DeploymentHandle) -> None:
    assert await (await handle.remote(1)) == 1


async def by_unread_ref(handle: DeploymentHandle) -> None:
    await handle.remote(1)


async def by_unawaited_task(handle: DeploymentHandle) -> None:
    handle.remote(1)


async def by_failure(handle: DeploymentHandle) -> None:
    with pytest.raises(ValueError, match="no"):
        await handle.fail.call()


async def by_unread_failure(handle: DeploymentHandle) -> None:
    await handle.fail.remote()


async def by_deadline(handle: DeploymentHandle) -> None:
    with pytest.raises(RequestTimeoutError):
        await handle.held.options(timeout_s=0.05).call(1)


async def by_large_value(handle: DeploymentHandle) -> None:
    assert len(await handle.large.call()) == LARGE


async def by_unread_large_value(handle: DeploymentHandle) -> None:
    await handle.large.remote()


async def by_large_argument(handle: DeploymentHandle) -> None:
    assert len(await handle.call(b"x" * LARGE)) == LARGE


async def by_sync_call(handle: DeploymentHandle) -> None:
    assert await anyio.to_thread.run_sync(blocking(handle).call, 1) == 1


async def by_sync_map(handle: DeploymentHandle) -> None:
    assert await anyio.to_thread.run_sync(lambda: list(blocking(handle).map(range(50)))) == list(range(50))


async def by_sync_ref(handle: DeploymentHandle) -> None:
    assert await anyio.to_thread.run_sync(lambda: blocking(handle).remote(1).result()) == 1


async def by_unread_sync_ref(handle: DeploymentHandle) -> None:
    await anyio.to_thread.run_sync(lambda: dropped(blocking(handle).remote(1)))


async def by_delay(handle: DeploymentHandle) -> None:
    await handle.options(delay_s=0.05).remote(1)


WAYS = [
    by_call, by_map, by_map_as_completed, by_refs_of_a_map, by_unread_refs_of_a_map, by_awaited_ref, by_unread_ref,
    by_unawaited_task, by_failure,
    by_unread_failure, by_deadline, by_large_value, by_unread_large_value, by_large_argument, by_sync_call,
    by_sync_map, by_sync_ref, by_unread_sync_ref, by_delay,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
async def test_result_that_was_shared_with_nobody_is_deleted_soon(
    serving: Serving, redis: Control, notes: Notes, way: Callable[[DeploymentHandle], Any]
) -> None:
    handle = serving(Ledger, notes)

    await way(handle)

    await wait_until(lambda: is_clean(redis))
    await wait_until(lambda: not engines.current().pending)


async def test_dropped_request_runs_and_then_its_result_is_deleted(
    serving: Serving, redis: Control, notes: Notes
) -> None:
    handle = serving(Ledger, notes)
    ref = await handle.held.remote(1)

    del ref
    await asyncio.sleep(0.1)
    notes.gate.open()

    await wait_until(lambda: notes.gate.passed == 1)
    await wait_until(lambda: is_clean(redis))
    assert await handle.counted.call() == {1: 1}


async def test_cancelled_request_leaves_nothing_when_its_ref_is_gone(serving: Serving, redis: Control) -> None:
    ref = await serving(Ledger, Notes()).held.remote(1)
    task = ref.acancel()
    assert await task
    with pytest.raises(RequestCancelledError):
        await ref

    del ref

    await wait_until(lambda: is_clean(redis))


async def test_value_can_be_read_again_from_the_ref_whatever_was_deleted(serving: Serving, redis: Control) -> None:
    ref = await serving(Ledger).remote("x")

    assert await ref == "x"
    await passes(redis)

    assert await ref == "x"
    assert await anyio.to_thread.run_sync(ref.result) == "x"
    assert ref.future().result(1) == "x"


async def test_10_000_forgotten_requests_leave_no_keys_and_no_memory(serving: Serving, redis: Control) -> None:
    handle = serving(Ledger)
    await handle.call("warm")
    await wait_until(lambda: is_clean(redis))
    keys_before, cells_before = await redis.dbsize(), count_cells()

    for start in range(0, 10_000, 500):
        for x in range(start, start + 500):
            handle.remote(x)
        await asyncio.sleep(0)
    await wait_until(lambda: not engines.current().pending, 30)

    await wait_until(lambda: is_clean(redis), 10)
    assert await redis.dbsize() == keys_before
    drops = engines.current().drops
    assert not drops._dropped and not drops._abandoned and not drops._large
    assert count_cells() == cells_before
    assert sum((await handle.counted.call()).values()) == 10_001


def count_cells() -> int:
    gc.collect()
    return sum(isinstance(one, Cell) for one in gc.get_objects())


# kept


def by_id(ref: ObjectRef, handle: DeploymentHandle) -> Any:
    return ref.id


def by_repr(ref: ObjectRef, handle: DeploymentHandle) -> Any:
    return repr(ref)


def by_hex(ref: ObjectRef, handle: DeploymentHandle) -> Any:
    return ref.hex()


def by_pickle(ref: ObjectRef, handle: DeploymentHandle) -> Any:
    return pickle.dumps(ref)


def by_argument(ref: ObjectRef, handle: DeploymentHandle) -> Any:
    return handle.take.call(ref)


def by_nested_argument(ref: ObjectRef, handle: DeploymentHandle) -> Any:
    return handle.take.call({"somewhere": [ref]})


@pytest.mark.parametrize("share", [by_id, by_repr, by_hex, by_pickle, by_argument, by_nested_argument])
@pytest.mark.parametrize("when", ["before its end", "after it was read"])
async def test_result_that_somebody_may_ask_for_stays(
    serving: Serving, redis: Control, share: Callable[[ObjectRef, DeploymentHandle], Any], when: str
) -> None:
    handle = serving(Ledger)
    ref = await handle.remote("kept")
    if when == "after it was read":
        assert await ref == "kept"
    shared = share(ref, handle)
    assert await ref == "kept"
    ref_id = ref._id

    del ref
    if isinstance(shared, asyncio.Future):
        await shared
    await passes(redis)

    assert await ObjectRef.from_id(ref_id) == "kept"
    assert 0 < await redis.ttl(DeploymentKeys("ms", "app.Ledger").result(ref_id[-22:])) <= 3600


async def test_result_of_an_unawaited_task_that_was_passed_on_stays(serving: Serving, redis: Control) -> None:
    handle = serving(Ledger)
    task = handle.remote("kept")
    ref_id = task.ref._id

    assert await handle.take.call(task, [task]) == ("kept", [ObjectRef.from_id(ref_id)])
    del task
    await passes(redis)

    assert await ObjectRef.from_id(ref_id) == "kept"


async def test_dependant_gets_its_value_though_its_caller_has_forgotten_the_upstream(
    serving: Serving, notes: Notes
) -> None:
    handle = serving(Ledger, notes)
    dependant = handle.take.call(handle.held.remote("value"))
    await wait_until(lambda: notes.gate.inside == 1)
    gc.collect()

    notes.gate.open()

    assert await asyncio.wait_for(dependant, 5) == ("value",)


async def test_ref_made_of_an_id_deletes_nothing(serving: Serving, redis: Control) -> None:
    ref = await serving(Ledger).remote("kept")
    again = ObjectRef.from_id(ref.id)
    assert await again == "kept"

    del again
    await passes(redis)

    assert len(await left(redis)) == 1
