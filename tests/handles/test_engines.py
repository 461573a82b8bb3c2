"""Which engine serves whom, and that each one ends in order: with its loop, at shutdown, at exit, and in a fork."""

import asyncio
import threading
from typing import Any

import anyio
import anyio.to_thread
import pytest

from millstream.broker.connection import Control
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError
from millstream.handles import engines
from millstream.handles.engine import Engine
from millstream.handles.handle import DeploymentHandle, SyncHandle
from tests.handles.scripts import run_script
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Serving, connections


class Model:
    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate or Gate()

    async def __call__(self, x: Any = None) -> Any:
        return x

    async def held(self, x: Any = None) -> Any:
        await self._gate.wait()
        return x


async def engine_here() -> Engine:
    return engines.current()


async def call(handle: DeploymentHandle, x: Any) -> Any:
    return await handle.call(x)


async def ours(redis: Control) -> list[tuple[Control, str]]:
    """The connections of this process's engines."""
    return await connections(redis, "ms:client:") + await connections(redis, "ms:replies:")


# one per loop


@pytest.mark.anyio
async def test_loop_has_one_engine(connected: Settings) -> None:
    assert engines.current() is engines.current()
    assert engines.background() is engines.background()
    assert engines.background().engine is not engines.current()


def test_every_loop_has_its_own_engine(connected: Settings) -> None:
    first, second = asyncio.run(engine_here()), asyncio.run(engine_here())

    assert first is not second
    assert first.name != second.name


def test_all_threads_share_one_engine(connected: Settings) -> None:
    found: list[engines.Background] = []
    barrier = threading.Barrier(8)

    def look() -> None:
        barrier.wait()
        found.append(engines.background())

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(found)) == 1


def test_handle_can_be_used_in_one_loop_after_the_other(serving: Serving) -> None:
    handle = serving(Model)

    assert [asyncio.run(call(handle, x)) for x in range(5)] == list(range(5))


def test_refs_of_engines_differ() -> None:
    async def some() -> list[bytes]:
        engine = Engine(Settings("redis://127.0.0.1:1"))
        return [engine.new_ref() for _ in range(100)]

    refs = [*asyncio.run(some()), *asyncio.run(some())]

    assert len(set(refs)) == 200
    assert {len(ref) for ref in refs} == {22}


# settings


def test_settings_are_found_in_the_environment_when_nobody_has_said_them(
    connected: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines.close_all()
    assert not engines.is_initialized()
    for name, value in connected.to_environment().items():
        monkeypatch.setenv(name, value)

    assert engines.settings() == connected
    assert engines.is_initialized()


@pytest.mark.anyio
async def test_same_settings_again_change_nothing_and_others_close_the_engines(connected: Settings) -> None:
    engine, background = engines.current(), engines.background()

    engines.use(connected)
    assert engines.current() is engine and not engine.is_closed

    engines.use(Settings(connected.url, "other"))
    assert engine.is_closed and background.engine.is_closed
    assert engines.current() is not engine and engines.current().settings.namespace == "other"


# the end


@pytest.mark.anyio
async def test_end_of_a_loop_closes_its_connections(serving: Serving, redis: Control) -> None:
    handle = serving(Model)
    before = set(await ours(redis))

    await anyio.to_thread.run_sync(asyncio.run, call(handle, 1))

    async def are_gone() -> bool:
        return set(await ours(redis)) == before

    await wait_until(are_gone)


@pytest.mark.anyio
async def test_shutdown_tells_everybody_who_waits_and_the_next_call_connects_anew(
    serving: Serving, connected: Settings
) -> None:
    gate = Gate()
    handle = serving(Model, gate)
    future, ref = handle.held.call(1), await handle.held.remote(2)
    task = asyncio.ensure_future(_await(ref))
    blocked = asyncio.create_task(
        anyio.to_thread.run_sync(SyncHandle(handle.deployment_name, handle.app_name).held.call, 3)
    )
    await wait_until(lambda: gate.inside == 3)

    await anyio.to_thread.run_sync(engines.close_all)

    for waiting in (future, task, blocked):
        with pytest.raises(BrokerUnavailableError, match="closed"):
            await asyncio.wait_for(waiting, 5)
    engines.use(connected)
    gate.open()
    assert await handle.call(4) == 4
    assert await ref == 2


async def _await(ref: Any) -> Any:
    return await ref


@pytest.mark.anyio
@pytest.mark.parametrize("passes", [0, 1, 2, 3, 5, 8])
async def test_engine_closed_while_it_connects_leaves_no_connection(
    connected: Settings, redis: Control, passes: int
) -> None:
    future = DeploymentHandle("Model", "app").call(1)
    for _ in range(passes):
        await asyncio.sleep(0)

    engines.current().close()

    with pytest.raises(BrokerUnavailableError):
        await asyncio.wait_for(future, 5)

    async def are_gone() -> bool:
        return await ours(redis) == []

    await wait_until(are_gone)


# whole processes


@pytest.mark.parametrize("runner", ["asyncio.run", "__import__('uvloop').run"])
def test_process_that_uses_loop_after_loop_and_threads_ends_without_a_word(serving: Serving, runner: str) -> None:
    serving(Model)

    script = f"""
        async def main(x):
            tasks = [handle.remote(i) for i in range(50)]
            futures = [handle.call(i) for i in range(50)]
            assert sum(await asyncio.gather(*futures)) == 1225
            handle.call(1)  # nobody waits for this one
            return await handle.call(x)

        print([{runner}(main(x)) for x in range(3)], sync.call(3), millstream.get(sync.remote(4)))
        thread = threading.Thread(target=lambda: print(sync.call(5)))
        thread.start()
        thread.join()
        print({runner}(main(6)))
        gc.collect()
    """

    assert run_script(script, engines.settings()) == "[0, 1, 2] 3 4\n5\n6\n"


def test_process_may_end_with_requests_under_way(serving: Serving) -> None:
    gate = Gate()
    serving(Model, gate)

    script = """
        async def main():
            refs = [await handle.held.remote(i) for i in range(5)]
            handle.held.call(1)
            waiting = asyncio.ensure_future(asyncio.wait(refs))
            await asyncio.sleep(0)

        asyncio.run(main())
        ref = sync.held.remote(1)
        print(ref.done())
    """

    assert run_script(script, engines.settings()) == "False\n"
    gate.open()  # only now: nothing of it had ended before


def test_process_may_shut_down_and_go_on(serving: Serving) -> None:
    serving(Model)

    script = """
        async def main(x):
            return await handle.call(x)

        for x in range(3):
            print(sync.call(x), asyncio.run(main(x)))
            millstream.shutdown()
        gc.collect()
    """

    assert run_script(script, engines.settings()) == "0 0\n1 1\n2 2\n"


def test_forked_child_makes_its_own_connections_and_the_parent_keeps_its_own(serving: Serving) -> None:
    gate = Gate()
    serving(Model, gate)

    script = """
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on: fork of a process with threads

        async def main(x):
            return await handle.call(x)

        ended, running = sync.remote(1), sync.held.remote(2)
        assert ended.result() == 1
        asyncio.run(main(3))
        children = []
        for child in range(3):
            pid = os.fork()
            if pid == 0:
                try:
                    assert ended.result(5) == 1
                    say("child", sync.call(10 + child), asyncio.run(main(20 + child)))
                    say("held", running.result(10))
                finally:
                    sys.stderr.flush()
                    os._exit(0)
            children.append(pid)
        say("parent", sync.call(5), asyncio.run(main(6)))
        for pid in children:
            os.waitpid(pid, 0)
        say(running.result(5))
    """

    opener = threading.Thread(target=_open_when_others_wait, args=[gate])
    opener.start()
    lines = run_script(script, engines.settings()).splitlines()
    opener.join()

    expected = [f"child {10 + n} {20 + n}" for n in range(3)] + ["held 2"] * 3 + ["parent 5 6", "2"]
    assert sorted(lines) == sorted(expected)


def _open_when_others_wait(gate: Gate) -> None:
    pause = threading.Event()
    while not gate.inside:
        pause.wait(0.01)
    pause.wait(0.3)
    gate.open()


def test_fork_while_another_thread_is_busy_with_results_does_not_block_the_child(serving: Serving) -> None:
    serving(Model)

    script = """
        from millstream.handles import cell
        warnings.simplefilter("ignore", DeprecationWarning)
        held = threading.Event()

        def hold():
            with cell._lock:
                held.set()
                threading.Event().wait(0.5)

        assert sync.call(1) == 1
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        pid = os.fork()
        if pid == 0:
            say(sync.call(2))
            os._exit(0)
        os.waitpid(pid, 0)
        thread.join()
    """

    assert run_script(script, engines.settings()) == "2\n"
