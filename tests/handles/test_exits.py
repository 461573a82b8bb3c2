"""A process that ends in the middle of things: at once, with its own exit code, and without a word on stderr."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from millstream.handles import engines
from tests.handles.scripts import run_script
from tests.replica_helpers import Gate, Serving

QUICK_S = 10.0  # a request under way would hold a script up for good; starting Python takes seconds on a busy machine


class Model:
    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate or Gate()

    async def __call__(self, x: Any = None) -> Any:
        return x

    async def held(self, x: Any = None) -> Any:
        await self._gate.wait()
        return x

    async def endless(self) -> Any:
        x = 0
        while True:
            yield x
            x += 1


@pytest.fixture
def held(serving: Serving) -> Iterator[None]:
    """A deployment whose method `held` does not return before the test is over."""
    gate = Gate()
    serving(Model, gate)
    yield
    gate.open()


@contextmanager
def quickly() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < QUICK_S


# the end of the main thread

WAITING = {
    "call": "sync.held.call(1)",
    "remote": "serve.get_deployment_handle('Nowhere', 'app2', sync=True).remote(1)",
    "result": "sync.held.remote(1).result()",
    "get": "millstream.get([sync.held.remote(1), sync.held.remote(2)])",
    "wait": "millstream.wait([sync.held.remote(1)])",
    "map": "list(sync.held.map(range(10)))",
    "future": "sync.held.remote(1).future().result()",
    "stream": "[x for x in sync.endless.stream() if x < 0]",
    "asyncio": "asyncio.run(main())",
}
MAIN = """
async def main():
    return await handle.held.call(1)

def wait():
    {waiting}

"""


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("how", [name for name in WAITING if name != "remote"])
def test_daemon_threads_that_wait_are_left_behind(how: str) -> None:
    script = (
        MAIN.format(waiting=WAITING[how])
        + """
thread = threading.Thread(target=wait, daemon=True)
thread.start()
assert sync.call(1) == 1
time.sleep(0.3)  # it waits by now
say(thread.is_alive())
"""
    )

    with quickly():
        assert run_script(script, engines.settings()) == "True\n"


@pytest.mark.usefixtures("held")
def test_requests_of_all_kinds_may_be_under_way() -> None:
    script = """
        refs = [sync.held.remote(x) for x in range(3)]
        future = refs[0].future()
        mapping = sync.held.map(range(100), max_in_flight=10, ordered=False)
        stream = sync.endless.stream()
        next(stream)

        async def main():
            tasks = [handle.held.remote(x) for x in range(3)]
            calls = [handle.held.call(x) for x in range(3)]
            stream = handle.endless.stream()
            await anext(stream)
            waiting = [asyncio.ensure_future(asyncio.wait(refs)), asyncio.ensure_future(value(refs[1]))]
            mapping = handle.map(range(1000), max_in_flight=5)
            await anext(mapping)
            await tasks[0]
            later.append((tasks, calls, stream, waiting, mapping))

        async def value(ref):
            return await ref

        later = []
        asyncio.run(main())
        say("done")
    """

    with quickly():
        assert run_script(script, engines.settings()) == "done\n"


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("runner", ["asyncio.run", "__import__('uvloop').run"])
def test_loop_may_end_before_its_first_connection_is_up(runner: str) -> None:
    script = f"""
        async def main(passes):
            tasks = [handle.remote(x) for x in range(3)] + [handle.remote([handle.remote(1)])]
            futures = [handle.call(1), handle.held.call(1)]
            stream = handle.endless.stream()
            for _ in range(passes):
                await asyncio.sleep(0)

        for passes in (0, 1, 2, 3, 5, 8, 13, 21):
            {runner}(main(passes))
            gc.collect()
        say(sync.call("done"))
    """

    with quickly():
        assert run_script(script, engines.settings()) == "done\n"


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("runner", ["asyncio.run", "__import__('uvloop').run"])
def test_sys_exit_in_a_coroutine_with_requests_under_way(runner: str) -> None:
    script = f"""
        async def main():
            tasks = [handle.held.remote(x) for x in range(5)]
            waiting = asyncio.create_task(wait(await tasks[0]))
            handle.held.call(1)
            async for value in handle.map(range(100), max_in_flight=3):
                if value == 5:
                    sys.exit(3)

        async def wait(ref):
            await ref

        {runner}(main())
    """

    with quickly():
        assert run_script(script, engines.settings(), code=3) == ""


@pytest.mark.usefixtures("held")
def test_error_in_the_main_thread_ends_it_with_that_error_only() -> None:
    script = """
        sys.excepthook = lambda cls, error, traceback: say(cls.__name__, error)

        async def main():
            handle.held.remote(1)
            await handle.call(1)
            raise RuntimeError("ours")

        asyncio.run(main())
    """

    with quickly():
        assert run_script(script, engines.settings(), code=1) == "RuntimeError ours\n"


# atexit


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("registered", ["before", "after"])
def test_functions_of_atexit_may_still_call(registered: str) -> None:
    register = """
def at_exit():
    say(sync.call("sync"), asyncio.run(main()), millstream.get(sync.remote("ref")))

async def main():
    return await handle.call("async")

atexit.register(at_exit)
"""
    use = "say(sync.call(1))\nsync.held.remote(2)\n"
    if registered == "before":  # so it runs after ours
        script = f"atexit.unregister(millstream.handles.engines._close_at_exit)\n{register}\n"
        script += f"atexit.register(millstream.handles.engines._close_at_exit)\n{use}"
    else:
        script = register + use

    with quickly():
        assert run_script(script, engines.settings()) == "1\nsync async ref\n"


@pytest.mark.usefixtures("held")
def test_shutdown_tells_threads_that_wait_and_the_end_after_it_is_quiet() -> None:
    script = """
        def read(ref):
            try:
                ref.result()
            except millstream.BrokerUnavailableError:
                say("told")

        thread = threading.Thread(target=read, args=[sync.held.remote(1)])
        thread.start()
        time.sleep(0.3)
        millstream.shutdown()
        millstream.shutdown()
        thread.join()
    """

    with quickly():
        assert run_script(script, engines.settings()) == "told\n"


# Ctrl-C


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("how", WAITING)
def test_ctrl_c_interrupts_whoever_waits_and_the_process_goes_on(serving: Serving, how: str) -> None:
    if how == "remote":
        serving.deploy_only(Model, name="Nowhere")
    script = (
        MAIN.format(waiting=WAITING[how])
        + """
assert sync.call(1) == 1
say("ready")
try:
    wait()
except KeyboardInterrupt:
    say("interrupted")

async def again():
    return await handle.call("here too")

say(sync.call("goes on"), asyncio.run(again()))
"""
    )

    with quickly():
        assert run_script(script, engines.settings(), interrupt=True) == "interrupted\ngoes on here too\n"


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("how", ["call", "asyncio"])
def test_ctrl_c_that_nobody_catches_ends_the_process_as_usual(how: str) -> None:
    script = (
        MAIN.format(waiting=WAITING[how])
        + """
sys.excepthook = lambda cls, error, traceback: say(cls.__name__)
assert sync.call(1) == 1
say("ready")
wait()
"""
    )

    with quickly():
        assert run_script(script, engines.settings(), interrupt=True, code=-2) == "KeyboardInterrupt\n"
