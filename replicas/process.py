"""The launcher's side of its processes: warm parents and the replicas they fork, each watched through a pidfd."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from millstream.broker.records import Current
from millstream.config import Settings
from millstream.errors import MillstreamError
from millstream.replicas.control import Control

Message = dict[str, Any]


class WarmFailed(MillstreamError):
    """The application cannot be imported. `traceback` has the details."""

    traceback: str = ""


class CannotFork(MillstreamError):
    """The application is imported, but its process may not fork."""


class WarmParent:
    """One warm parent process. It is spawned at once, blank; `warm()` makes it import an application."""

    def __init__(self, settings: Settings) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "millstream.replicas.warm", str(theirs.fileno())]
        environment = {**os.environ, **settings.to_environment(), "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        self._control = Control(ours)
        self._forked: dict[str, asyncio.Future[int]] = {}
        self._ended: dict[int, asyncio.Future[str]] = {}
        self._is_warm: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read())
        self.is_closed = False
        self.warming: asyncio.Future[None] | None = None

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None and not self.is_closed

    async def warm(self, app: str, tags: list[str], *, spawn: bool, fork_anyway: bool = False) -> None:
        """Import an application. `spawn`: to become one replica; `fork_anyway`: its threads do not matter. Raises WarmFailed, or CannotFork (then the process is gone)."""
        await self._control.send({"app": app, "tags": tags, "spawn": spawn, "fork_anyway": fork_anyway})
        await self._is_warm

    async def fork(self, order: Message, files: list[int]) -> int:
        """Have it fork (or become) a replica; the pid. Raises WarmFailed if the process has gone."""
        forked = self._forked[order["replica"]] = asyncio.get_running_loop().create_future()
        try:
            await self._control.send_with_files(order, files)
        except OSError as e:
            raise WarmFailed("the warm parent has gone") from e
        pid: int = await forked
        self._ended[pid] = asyncio.get_running_loop().create_future()
        return pid

    async def how_it_ended(self, pid: int, patience_s: float) -> str:
        """The exit of a child in words; the parent's report is a hair behind the pidfd, and may never come."""
        ended = self._ended.get(pid)
        if ended is None or not self.is_alive:
            return "died"
        try:
            return await asyncio.wait_for(ended, patience_s)
        except TimeoutError:
            return "died"
        finally:
            del self._ended[pid]

    def close(self) -> None:
        """Let it go; replicas that it forked live on."""
        self.is_closed = True
        self._reading.cancel()
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0.5)

    async def _read(self) -> None:
        async for message in self._control.messages():
            self._heard(message)
        self._fail(
            WarmFailed("importing the application ended its process", traceback="(no traceback: see the output above)")
        )

    def _heard(self, message: Message) -> None:
        if "warm" in message:
            self._is_warm.set_result(None)
        elif "failed" in message:
            self._fail(WarmFailed(message["failed"], traceback=message["traceback"]))
        elif "cannot_fork" in message:
            self._fail(CannotFork(message["cannot_fork"]))
        elif "forked" in message:
            self._forked.pop(message["replica"]).set_result(message["forked"])
        elif "ended" in message:
            ended = self._ended.get(message["ended"])
            if ended is not None and not ended.done():
                ended.set_result(message["how"])

    def _fail(self, error: MillstreamError) -> None:
        futures: list[asyncio.Future[Any]] = [self._is_warm, *self._forked.values()]
        for future in futures:
            if not future.done():
                future.set_exception(error)
                future.exception()  # retrieved: of a spare parent nobody will ask


class ReplicaProcess:
    """One replica process: its pid, what it last said, and a callback at its death."""

    def __init__(
        self, replica: str, tag: str, started_with: Current, pid: int, parent: WarmParent, control: Control
    ) -> None:
        self.replica, self.tag, self.version, self.pid = replica, tag, started_with.version, pid
        self.parent, self.control = parent, control
        self.works_by = started_with
        self.heading = started_with.revision  # of the config that it was told last
        self._told: dict[str, Current] = {}  # by revision, until it answers
        self.stuck_at = ""  # a revision that it cannot come to: its requests do not end
        self.is_spent = False  # the config that it works by was withdrawn, and it cannot take over the one before
        self.is_ready = False
        self.is_draining = False
        self.ongoing = 0
        self.connections: list[int] = []
        self.failure: tuple[str, str] | None = None  # message, traceback: its constructor raised
        self.condemned = ""  # why we have killed it
        self.started_at = self.well_at = time.monotonic()
        self.kill_at: float | None = None
        self._when_orphaned: Callable[[ReplicaProcess], None] | None = None
        self._pidfd = _pidfd_of(pid)

    @property
    def is_updating(self) -> bool:
        return bool(self._told)

    def hear(self, message: Message) -> None:
        """Remember what it says of itself."""
        self.well_at = time.monotonic()
        match message:
            case {"ready": connections}:
                self.is_ready, self.connections = True, connections
            case {"well": ongoing}:
                self.ongoing = ongoing
            case {"failed": text, "traceback": traceback}:
                self.failure = (text, traceback)
            case {"configured": revision}:
                self.works_by = self._told.pop(revision, self.works_by)
                if revision == self.heading:
                    self._told.clear()
            case {"refused": revision}:
                self._told.pop(revision, None)
            case {"stuck": revision}:
                self._told.pop(revision, None)
                self.stuck_at = revision

    async def update(self, current: Current) -> None:
        """Tell it a newer config; the last one told counts."""
        self.heading = current.revision
        self._told[current.revision] = current
        await self.control.send({"update": current.revision, "config": current.config.to_json()})

    def watch(self, on_death: Callable[["ReplicaProcess"], None]) -> None:
        """Call `on_death(self)` once, about a millisecond after the process ends; by the closing of its socket, while
        `listen` runs, where there are no pidfds, or where it had ended and was reaped before we could get one."""
        loop = asyncio.get_running_loop()
        if self._pidfd is None:
            self._when_orphaned = on_death
            return
        pidfd = self._pidfd

        def readable() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            on_death(self)

        loop.add_reader(pidfd, readable)

    async def listen(self, on_message: Callable[["ReplicaProcess", Message], None]) -> None:
        async for message in self.control.messages():
            on_message(self, message)
        if self._when_orphaned is not None:
            self._when_orphaned(self)

    async def drain(self, grace_s: float) -> None:
        """Ask it to finish and end; it is killed `grace_s` and a little later."""
        self.expect_end(grace_s)
        await self.control.send({"drain": True})

    def expect_end(self, grace_s: float) -> None:
        """It drains by its own decision: another takes its place at once, and it is killed if it takes too long."""
        self.is_draining = True
        self.kill_at = time.monotonic() + grace_s + 2.0

    def kill(self, why: str = "") -> None:
        self.condemned = self.condemned or why
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def _pidfd_of(pid: int) -> int | None:
    """None where there are none, or no such process any more: its parent is quicker than we are now and then."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
