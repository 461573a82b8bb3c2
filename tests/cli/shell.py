"""A shell in a folder of its own: runs `millstream` as a person would, and knows every process that lives in there."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.scenarios.processes import command_line, parents, wait_for

ROOT = Path(__file__).parents[2]
MILLSTREAM = (sys.executable, "-m", "millstream")
PATIENCE_S = 30.0  # two busy cores start a tree of processes slowly

HELLO = """
import asyncio
from millstream import serve

@serve.deployment
class Hello:
    async def __call__(self, name="you"):
        print("greeting", name)
        return f"hello {name}"

    async def add(self, a, b=0):
        return {"sum": a + b}

    async def boom(self):
        raise ValueError("out of cheese")

    async def hold(self):
        await asyncio.sleep(3600)

app = Hello.options(graceful_shutdown_timeout_s=0.5).bind()
"""


@dataclass(frozen=True, slots=True)
class Said:
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def complaint(self) -> str:
        """Its one line on stderr."""
        assert self.err.count("\n") == 1 and self.err.startswith("millstream: "), self.err
        return self.err.removeprefix("millstream: ").strip()


class Running:
    """A command that stays. Its output goes to a file, as it comes."""

    def __init__(self, shell: "Shell", arguments: tuple[str, ...], *, stdin: int = subprocess.DEVNULL) -> None:
        self._log = shell.folder / f"output-{len(shell.started)}"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                (*MILLSTREAM, *arguments),
                cwd=shell.folder,
                env=shell.environment,
                stdin=stdin,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C for it is not one for pytest
            )
        shell.started.append(self)

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()

    def expect(self, text: str, timeout_s: float = PATIENCE_S) -> "Running":
        """Wait until it has printed `text`."""
        wait_for(lambda: text in self.output or self.process.poll() is not None, timeout_s, f"{text!r}")
        assert text in self.output, f"it ended with {self.process.returncode} and said:\n{self.output}"
        return self

    def send(self, number: signal.Signals) -> "Running":
        self.process.send_signal(number)
        return self

    def end(self, number: signal.Signals = signal.SIGINT) -> int:
        """Ask it to end, and wait for that; its exit code."""
        return self.send(number).wait()

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        return self.process.wait(timeout_s)


class Shell:
    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        ours = {name: value for name, value in os.environ.items() if not name.startswith("MILLSTREAM_")}
        self.environment = {**ours, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment}
        self.started: list[Running] = []

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def millstream(self, *arguments: str, stdin: str = "", cwd: Path | None = None) -> Said:
        """Run a command to its end."""
        done = subprocess.run(
            (*MILLSTREAM, *arguments),
            cwd=cwd or self.folder,
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def start(self, *arguments: str, stdin: int = subprocess.DEVNULL) -> Running:
        return Running(self, arguments, stdin=stdin)

    def run(self, target: str = "hello:app", *arguments: str) -> Running:
        """`millstream run`, serving; without the dashboard, whose port others may want."""
        return self.start("run", target, "--no-dashboard", *arguments).expect("serving ")

    def processes(self) -> set[int]:
        """Every process that lives in this folder: all that a command starts, and the embedded server."""
        return {pid for pid in parents() if pid != os.getpid() and self._lives_here(pid)}

    def _lives_here(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return Path(os.readlink(f"/proc/{pid}/cwd")).is_relative_to(self.folder)
        return False

    def close(self) -> Iterator[str]:
        """End what is left; a line for each process that should not have been."""
        for running in self.started:
            if running.process.poll() is None:
                running.process.kill()
            running.process.wait()
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not self.processes(), PATIENCE_S)
        for pid in self.processes():
            yield f"{pid} {command_line(pid)}"
            os.kill(pid, signal.SIGKILL)
