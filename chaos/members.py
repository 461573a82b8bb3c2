"""The processes of a run that are killed and started again: launchers, the autoscaler, clients."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from millstream.liveness import may_live

SURE_AFTER_S = 10.0


@dataclass(slots=True)
class Member:
    """One process that is there again after each of its ends, until it ends by itself with 0."""

    name: str
    command: Callable[[int], list[str]]  # of a generation
    environment: dict[str, str]
    log: Path
    generation: int = 0
    not_before_s: float = 0.0
    process: "subprocess.Popen[bytes] | None" = None
    has_left: bool = False
    failures: list[str] = field(default_factory=list)
    was_killed: bool = False
    started_s: float = 0.0

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None and self.process.poll() is None else None

    def start(self) -> None:
        # stdin is a pipe that we hold: what is `--owned` ends with us, however we end.
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.command(self.generation)], env=self.environment, stdin=subprocess.PIPE,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.generation += 1
        self.started_s = time.monotonic()
        self.was_killed = False

    def look(self) -> bool:
        """Start it (again) if it is time to; True if that was done."""
        if self.has_left or time.monotonic() < self.not_before_s:
            return False
        code = None if self.process is None else self.process.poll()
        if self.process is not None and code is None:
            return False
        if code == 0:
            self.has_left = True
            return False
        # One that cannot reach the server when it starts says so and ends.
        if code is not None and not self.was_killed and time.monotonic() > self.started_s + SURE_AFTER_S:
            self.failures.append(f"{self.name} ended with exit code {code}")
        self.close_stdin()
        self.start()
        return True

    def kill(self, again_after_s: float) -> None:
        assert self.process is not None
        self.was_killed = True
        self.not_before_s = time.monotonic() + again_after_s
        self.process.kill()
        self.process.wait()

    def close_stdin(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()

    def end(self, timeout_s: float) -> None:
        """As its owner's end would; killed when that takes too long."""
        self.has_left = True
        if self.process is None:
            return
        self.close_stdin()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def descendants(pid: int) -> list[int]:
    """Processes started by a process, and by those, that live. Linux."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(folder.name)] = int(parent)
    found, more = {pid}, {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {pid})


def lives(pid: int) -> bool:
    """Is it there, and no zombie?"""
    return may_live(socket.gethostname(), pid)


def signal_all(pids: list[int], number: signal.Signals) -> list[int]:
    """Send a signal; those that were there."""
    there = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            there.append(pid)
    return there
