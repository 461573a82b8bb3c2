"""What is deleted must not be needed: results of what may be sent twice; and `__del__` may run anywhere, at any time."""

import asyncio
import gc
import threading
import weakref
from typing import Any

import anyio
import anyio.to_thread
import pytest

from millstream.broker.connection import Control
from millstream.config import Settings
from millstream.handles import cell, engines, lines
from millstream.handles.ref import ObjectRef
from tests.handles.elsewhere import run_elsewhere
from tests.handles.held import blocking
from tests.handles.ledger import Ledger, is_clean, left, passes
from tests.helpers import wait_until
from tests.replica_helpers import Serving, cut, wires

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]

# doubt


async def test_what_was_in_the_air_when_the_connection_was_lost_is_kept(serving: Serving, redis: Control) -> None:
    handle = serving(Ledger)
    await handle.call("warm")
    commands = wires(engines.current().lines.commands)

    futures = [handle.call(x) for x in range(100)]
    for wire in commands:
        wire.close()
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


async def test_what_is_handed_over_while_it_comes_and_ends_runs_once(serving: Serving) -> None:
    handle = serving(Ledger)
    await handle.call("warm")
    engine, background, is_over = engines.current(), engines.background().engine, threading.Event()
    failed: list[Exception] = []

    def hand_over() -> None:
        try:
            while not is_over.wait(0.0005):
                engine.resubmit_elsewhere(background)
        except Exception as e:
            failed.append(e)

    thread = threading.Thread(target=hand_over)
    thread.start()
    for start in range(0, 3000, 100):
        await asyncio.gather(*[handle.call(x) for x in range(start, start + 100)])
        engine.drops.flush()
    is_over.set()
    thread.join()

    assert failed == []
    assert set((await handle.counted.call()).values()) == {1}


async def test_what_has_been_read_is_not_sent_by_another_engine_any_more(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = serving(Ledger)
    await handle.call("warm")
    route = engines.current().route("app.Ledger")
    future = handle.call(1)
    await asyncio.sleep(0)  # it goes out at the end of this pass of the loop
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
