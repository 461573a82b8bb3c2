"""Handles, refs and engines over `os.fork` and multiprocessing: parent and child go on, and neither disturbs the other."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from millstream.handles import engines
from tests.handles.scripts import run_script
from tests.replica_helpers import Gate, Serving

# From Python 3.12 on, a fork of a process with threads warns; whoever preloads an application forks such a one.
FORK = """
warnings.simplefilter("ignore", DeprecationWarning)

async def main(x):
    return await handle.call(x)

def fork(work):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid

def wait_for(pid):
    assert os.waitpid(pid, 0)[1] == 0
"""


class Model:
    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate or Gate()

    async def __call__(self, x: Any = None) -> Any:
        return x

    async def held(self, x: Any = None) -> Any:
        await self._gate.wait()
        return x


def run(script: str, **options: Any) -> list[str]:
    return sorted(run_script(FORK + script, engines.settings(), **options).splitlines())


def test_fork_inside_a_running_loop(serving: Serving) -> None:
    serving(Model)

    script = """
async def forks():
    assert await handle.call(1) == 1
    ref = await handle.remote(2)

    def work():
        say("child", sync.call(3), asyncio.run(main(4)), ref.result(5), asyncio.run(value_of(ref)))

    pids = [fork(work) for _ in range(2)]
    say("parent", await handle.call(5), await ref)
    for pid in pids:
        await asyncio.to_thread(wait_for, pid)
    say("parent", await handle.call(6))

async def value_of(ref):
    return await ref

asyncio.run(forks())
say("after", asyncio.run(main(7)))
"""

    assert run(script) == ["after 7", "child 3 4 2 2", "child 3 4 2 2", "parent 5 2", "parent 6"]


def test_fork_in_a_thread_while_others_call(serving: Serving) -> None:
    serving(Model)

    script = """
stop = threading.Event()
wrong = []

def busy():
    while not stop.is_set():
        if sync.call(1) != 1:
            wrong.append(1)

def forks():
    for n in range(3):
        wait_for(fork(lambda: say("child", n, sync.call(n), asyncio.run(main(n)))))

assert sync.call(0) == 0
threads = [threading.Thread(target=busy) for _ in range(4)]
for thread in threads:
    thread.start()
forker = threading.Thread(target=forks)
forker.start()
forker.join()
stop.set()
for thread in threads:
    thread.join()
say("wrong", len(wrong))
"""

    assert run(script) == ["child 0 0 0", "child 1 1 1", "child 2 2 2", "wrong 0"]


@pytest.mark.parametrize("how", ["sync", "asyncio.run", "__import__('uvloop').run"])
def test_workers_of_a_preloaded_application_serve_and_end_in_order(serving: Serving, tmp_path: Path, how: str) -> None:
    """As gunicorn does it: the application is imported and used in the master, workers end by sys.exit."""
    serving(Model)

    script = f"""
def use(x):
    return {"sync.call(x)" if how == "sync" else f"{how}(main(x))"}

def worker(n):
    pid = os.fork()
    if pid:
        return pid
    results = []
    threads = [threading.Thread(target=lambda x: results.append(sync.call(x)), args=[x]) for x in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say("worker", n, use(n), kept.result(5), sorted(results))
    sys.exit(0)

assert use(1) == 1
kept = sync.remote("kept")
for generation in range(2):
    pids = [worker(10 * generation + n) for n in range(2)]
    say("master", use(generation))
    for pid in pids:
        wait_for(pid)
say("master", use(2), kept.result(5))
"""

    workers = [f"worker {n} {n} kept {list(range(8))}" for n in (0, 1, 10, 11)]
    assert run(script, path=str(tmp_path / "preloaded.py")) == sorted(
        ["master 0", "master 1", "master 2 kept", *workers]
    )


def test_child_is_told_of_requests_of_its_parent_and_the_other_way_round(serving: Serving) -> None:
    gate = Gate()
    serving(Model, gate)

    script = """
running = sync.held.remote(1)
reading, writing = os.pipe()

def work():
    os.write(writing, sync.held.remote(2).id.encode())
    say("child", running.result(20))

pid = fork(work)
theirs = millstream.ObjectRef.from_id(os.read(reading, 100).decode())
say("parent", running.result(20), theirs.result(20))
wait_for(pid)
"""

    opener = threading.Thread(target=_open_when_inside, args=[gate, 2])
    opener.start()
    assert run(script) == ["child 1", "parent 1 2"]
    opener.join()


def _open_when_inside(gate: Gate, count: int) -> None:
    deadline = time.monotonic() + 20
    while gate.inside < count and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # both wait by now
    gate.open()


def test_child_frees_nothing_that_its_parent_still_needs(serving: Serving) -> None:
    serving(Model)

    script = """
refs = [sync.remote(n) for n in range(50)]
pid = fork(lambda: (refs.clear(), gc.collect(), sync.call(1), time.sleep(1.2)))
wait_for(pid)
say([ref.result(5) for ref in refs] == list(range(50)))
"""

    assert run(script) == ["True"]


# multiprocessing

PROCESSES = """
import concurrent.futures, multiprocessing

def work(handle, sync, ref, queue):
    async def main():
        return await handle.call("async")
    queue.put((sync.call("sync"), asyncio.run(main()), ref.result(10)))

def square(x):
    return sync.call(x * x)

def call_it(handle, x):
    return handle.call(x)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("where", ["environment", "init"])
def test_handles_and_refs_are_arguments_of_processes(serving: Serving, tmp_path: Path, method: str, where: str) -> None:
    serving(Model)
    settings = engines.settings()
    init = f"millstream.init({settings.url!r}, secret_key={settings.secret_key!r})" if where == "init" else ""

    script = (
        PROCESSES
        + f"""
if __name__ == "__main__":
    {init}
    context = multiprocessing.get_context({method!r})
    ref = sync.remote("ref")
    queue = context.SimpleQueue()
    processes = [context.Process(target=work, args=(handle, sync, ref, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        say(queue.get())
    for process in processes:
        process.join()
    say([process.exitcode for process in processes], sync.call("still here"))
"""
    )

    said = run_script(
        FORK + script, settings if where == "environment" else None, path=str(tmp_path / "script.py")
    ).splitlines()

    assert said == ["('sync', 'async', 'ref')"] * 2 + ["[0, 0] still here"]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_handles_work_in_pools_of_processes(serving: Serving, tmp_path: Path, method: str) -> None:
    serving(Model)

    script = (
        PROCESSES
        + f"""
if __name__ == "__main__":
    import functools
    context = multiprocessing.get_context({method!r})
    assert sync.call(1) == 1
    with context.Pool(2) as pool:
        say(pool.map(square, range(5)))
        pool.close()
        pool.join()
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        say(list(pool.map(functools.partial(call_it, sync), range(5))))
"""
    )

    said = run_script(FORK + script, engines.settings(), path=str(tmp_path / "script.py")).splitlines()

    assert said == [str([0, 1, 4, 9, 16]), str([0, 1, 2, 3, 4])]
