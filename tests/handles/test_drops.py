"""Results that nobody can ask for any more are deleted, those that somebody may ask for are not."""

import asyncio
import gc
import pickle
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread
import pytest

from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys
from millstream.config import Settings
from millstream.errors import RequestCancelledError, RequestTimeoutError
from millstream.handles import cell, engines, lines
from millstream.handles.cell import Cell
from millstream.handles.handle import DeploymentHandle, SyncHandle
from millstream.handles.ref import ObjectRef
from tests.handles.elsewhere import run_elsewhere
from tests.handles.held import Notes
from tests.helpers import wait_until
from tests.replica_helpers import Serving, cut

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]

LARGE = 1_000_000


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is deleted twice a second is deleted fifty times a second."""
    monkeypatch.setattr(lines, "LOOK_EVERY_S", 0.02)


class Ledger:
    """Notes every run."""

    def __init__(self, notes: Notes | None = None) -> None:
        self._notes = notes
        self.runs: Counter[Any] = Counter()

    async def __call__(self, x: Any) -> Any:
        self.runs[x] += 1
        return x

    async def held(self, x: Any) -> Any:
        assert self._notes is not None
        self.runs[x] += 1
        await self._notes.gate.wait()
        return x

    async def large(self) -> bytes:
        return b"x" * LARGE

    async def fail(self) -> None:
        raise ValueError("no")

    async def take(self, *values: Any) -> Any:
        return values

    async def counted(self) -> Counter[Any]:
        return self.runs


def blocking(handle: DeploymentHandle) -> SyncHandle:
    return SyncHandle(handle.deployment_name, handle.app_name, handle._options)


async def left(redis: Control) -> list[str]:
    """The results and large values on the server."""
    keys = DeploymentKeys("ms", "app.Ledger")
    found: list[bytes] = []
    for prefix in (keys.result_prefix, keys.value_prefix, keys.payload_prefix):
        found += [key async for key in redis.scan_iter(f"{prefix}*", count=10_000)]
    return sorted(key.decode() for key in found)


async def is_clean(redis: Control) -> bool:
    return not await left(redis)


async def passes(redis: Control) -> None:
    """Return when what was to be deleted by now has been."""
    for engine in (engines.current(), engines.background().engine):
        engine.loop.call_soon_threadsafe(engine.drops.flush)
    await anyio.sleep(0.1)


# freed


def dropped(ref: ObjectRef) -> None:
    """The caller's reference is the last one."""


async def by_call(handle: DeploymentHandle) -> None:
    assert await handle.call(1) == 1


async def by_map(handle: DeploymentHandle) -> None:
    assert [value async for value in handle.map(range(50))] == list(range(50))


async def by_map_as_completed(handle: DeploymentHandle) -> None:
    assert {value async for value in handle.map(range(50), ordered=False)} == set(range(50))


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
    by_call, by_map, by_map_as_completed, by_awaited_ref, by_unread_ref, by_unawaited_task, by_failure,
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


# doubt


async def test_what_was_in_the_air_when_the_connection_was_lost_is_kept(serving: Serving, redis: Control) -> None:
    handle = serving(Ledger)
    await handle.call("warm")
    engine = engines.current()
    commands = engine.lines.commands
    assert commands is not None

    futures = [handle.call(x) for x in range(100)]
    commands.close()
    assert await asyncio.wait_for(asyncio.gather(*futures), 10) == list(range(100))
    await passes(redis)
    kept = await left(redis)
    assert len(kept) >= 100

    assert [await handle.call(x) for x in range(100, 150)] == list(range(100, 150))
    await passes(redis)
    assert await left(redis) == kept, "those made later are sure again"
    assert set((await handle.counted.call()).values()) == {1}


async def test_nothing_runs_twice_however_often_connections_are_lost(serving: Serving, redis: Control) -> None:
    handle = serving(Ledger)
    await handle.call("warm")
    values: list[int] = []

    async def caller(numbers: range) -> None:
        for x in numbers:
            values.append(await handle.call(x))

    async with anyio.create_task_group() as tasks:
        for start in range(0, 3000, 30):
            tasks.start_soon(caller, range(start, start + 30))
        for many in range(200, 2800, 400):
            await wait_until(lambda many=many: len(values) >= many and engines.current().lines.is_connected)
            await cut(redis, f"ms:client:{engines.current().name}")

    assert sorted(values) == list(range(3000))
    assert set((await handle.counted.call()).values()) == {1}


async def test_what_another_engine_sends_as_well_is_not_deleted_before_it_comes(
    serving: Serving, redis: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = serving(Ledger)
    await handle.call("warm")
    background = engines.background().engine
    adopt, late = background.sender.adopt, list[tuple[str, list[Any]]]()
    monkeypatch.setattr(background.sender, "adopt", lambda tag, requests: late.append((tag, requests)))

    futures = [handle.call(x) for x in range(50)]
    engines.current().resubmit_elsewhere(background)  # as a blocking call on this loop does
    await asyncio.gather(*futures)
    await passes(redis)
    assert late
    for tag, requests in late:
        background.loop.call_soon_threadsafe(adopt, tag, requests)
    await anyio.to_thread.run_sync(blocking(handle).call, "behind them")

    runs = await handle.counted.call()
    assert {x: runs[x] for x in range(50)} == dict.fromkeys(range(50), 1)


async def test_what_has_been_read_is_not_sent_by_another_engine_any_more(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = serving(Ledger)
    await handle.call("warm")
    route = engines.current().route("app.Ledger")
    future = handle.call(1)
    (batch,) = route.unacknowledged

    assert await future == 1
    route.unacknowledged.add(batch)  # as if the answer to the submit came later than the result

    assert engines.current().sender.unacknowledged(route) == []
    route.unacknowledged.clear()


# where `__del__` may run


async def test_refs_may_be_dropped_in_any_thread(serving: Serving, redis: Control) -> None:
    handle = serving(Ledger)
    refs = [[await handle.remote(x) for x in range(20)] for _ in range(8)]
    threads = [threading.Thread(target=some.clear) for some in refs]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    await wait_until(lambda: is_clean(redis))


async def test_collector_may_drop_refs_while_our_locks_are_held(serving: Serving, redis: Control) -> None:
    handle = serving(Ledger)
    await handle.call("warm")

    class Cycle:
        def __init__(self, ref: ObjectRef) -> None:
            self.ref, self.me = ref, self

    gone = [weakref.ref(Cycle(await handle.remote(x))) for x in range(20)]
    with cell._lock:
        gc.collect()

    assert all(one() is None for one in gone)
    await wait_until(lambda: is_clean(redis))


async def test_refs_may_be_dropped_after_their_engine(serving: Serving, settings: Settings) -> None:
    handle = serving(Ledger)
    refs = [await handle.remote(x) for x in range(10)]

    engines.close_all()
    refs.clear()
    engines.use(settings)

    assert await handle.call(1) == 1


EXITS = {
    "in globals": "refs = [handle.remote(x) for x in range(20)]",
    "in a cycle": "refs = [handle.remote(x) for x in range(20)]; refs.append(refs)",
    "in a frozen module": "import builtins; builtins.kept = [handle.remote(x) for x in range(20)]",
    "open": "refs = [handle.options(delay_s=30, block_until='queued').remote(x) for x in range(20)]",
}


@pytest.mark.parametrize("how", EXITS)
async def test_interpreter_ends_in_silence_with_refs_left(serving: Serving, settings: Settings, how: str) -> None:
    serving(Ledger)
    code = f"""
        from millstream import SyncHandle

        handle = SyncHandle("Ledger", "app")
        {EXITS[how]}
        """

    ran = await run_elsewhere(settings, code, "-X", "dev")

    assert (ran.stdout, ran.stderr) == ("", "")


# the end


async def test_end_of_the_loop_deletes_what_was_to_be_deleted(
    serving: Serving, redis: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LOOK_EVERY_S", 60)
    handle = serving(Ledger)

    async def main() -> None:
        assert [await handle.call(x) for x in range(20)] == list(range(20))
        await (await handle.remote(1))
        await handle.large.call()

    await anyio.to_thread.run_sync(asyncio.run, main())

    await wait_until(lambda: is_clean(redis), 1)


async def test_end_of_the_process_deletes_what_was_to_be_deleted(
    serving: Serving, redis: Control, settings: Settings
) -> None:
    serving(Ledger)
    code = """
        from millstream import SyncHandle

        handle = SyncHandle("Ledger", "app")
        assert [handle.call(x) for x in range(20)] == list(range(20))
        handle.remote(1).result()
        """

    await run_elsewhere(settings, code)

    await wait_until(lambda: is_clean(redis), 1)
