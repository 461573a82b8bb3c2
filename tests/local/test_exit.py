"""Programs in local mode that end without serve.shutdown(): quietly, at once, and with their server."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.local.conftest import OURS, ROOT
from tests.scenarios.processes import wait_for

pytestmark = pytest.mark.processes

PATIENCE_S = 10.0  # a program that hangs would need its timeout; two busy cores start Python slowly

BEGINNING = """
import asyncio, os, sys, threading, time
from millstream import serve

@serve.deployment
class Model:
    async def __call__(self, x):
        return x

    async def forever(self):
        await asyncio.Event().wait()

    async def stubborn(self):
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                pass

    async def stuck(self):
        time.sleep(3600)

    async def stuck_elsewhere(self):
        await asyncio.to_thread(time.sleep, 3600)

    def stuck_in_a_thread(self):
        time.sleep(3600)

if __name__ == "__main__":
    handle = serve.run(Model.bind(), local=True)
    assert handle.call(1) == 1
    print("served", flush=True)
"""


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str
    took_s: float
    left: list[Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tmp").mkdir()
    return tmp_path


def run(folder: Path, ending: str) -> Ended:
    """Run a program that serves, and then does `ending`."""
    lines = [f"    {line}" for line in ending.strip().splitlines()]
    (folder / "program.py").write_text("\n".join([BEGINNING, *lines]))
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")}
    environment |= {name: "" for name in OURS if name != "MILLSTREAM_STATE"}
    started = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-W", "error", "program.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    took_s = time.monotonic() - started
    return Ended(ran.returncode, ran.stdout, ran.stderr, took_s, list((folder / "tmp").iterdir()))


def test_nothing_is_said_and_nothing_stays(folder: Path) -> None:
    ended = run(folder, "")

    assert (ended.code, ended.out, ended.err) == (0, "served\n", "")
    assert ended.left == []  # the folder of the server goes last


@pytest.mark.parametrize("method", ["forever", "stubborn", "stuck", "stuck_elsewhere", "stuck_in_a_thread"])
def test_requests_that_never_end_do_not_hold_it_up(folder: Path, method: str) -> None:
    ended = run(folder, f"handle.{method}.remote()")

    assert (ended.code, ended.out) == (0, "served\n")
    assert ended.took_s < PATIENCE_S
    assert ended.left == []
    expected = "user's code keeps its thread" if method in ("stubborn", "stuck", "stuck_elsewhere") else ""
    assert expected in ended.err and ended.err.count("\n") <= 1, ended.err


def test_exit_code_and_exception_are_the_programs_own(folder: Path) -> None:
    assert run(folder, "sys.exit(7)").code == 7

    ended = run(folder, "raise ValueError('of the program')")

    assert ended.code == 1
    assert ended.err.endswith("ValueError: of the program\n") and ended.err.count("Traceback") == 1


def test_killed_program_takes_its_server_along(folder: Path) -> None:
    ended = run(folder, "os.kill(os.getpid(), 9)")

    assert ended.code == -9
    wait_for(lambda: not list((folder / "tmp").iterdir()), what="the end of its server")


def test_caller_in_another_thread_is_told_and_does_not_hang(folder: Path) -> None:
    ended = run(
        folder,
        """
def call():
    try:
        handle.forever.call()
    except Exception as e:
        print(type(e).__name__)

threading.Thread(target=call).start()
""",
    )

    assert ended.out == "served\nBrokerUnavailableError\n"
    assert ended.took_s < PATIENCE_S


def test_forked_child_leaves_all_to_its_parent(folder: Path) -> None:
    ended = run(
        folder,
        """
pid = os.fork()
if pid == 0:
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
print(handle.call("still there"))
""",
    )

    assert (ended.code, ended.out, ended.err) == (0, "served\nstill there\n", "")
