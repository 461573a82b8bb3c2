"""The processes that a `serve.run` or `millstream run` owns: server, launcher, autoscaler, dashboard.

Each holds the reading end of a pipe from its owner as stdin: when the owner exits or is killed, they end. One that dies
by itself is started again.
"""

import atexit
import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from millstream import embedded
from millstream.config import Settings

LOOK_EVERY_S = 0.25
RESTART_AFTER_S = 0.5  # doubled each time for a child that dies again and again
RESTART_MOST_S = 10.0
LASTED_S = 60.0  # a child that lived so long starts with a clean slate
HOPELESS_AFTER = 3  # quick deaths in a row
log = logging.getLogger("millstream")


@dataclass
class _Child:
    """One process that is kept running."""

    name: str
    command: list[str]
    environment: dict[str, str]
    process: "subprocess.Popen[bytes]"
    started_at: float
    quick_deaths: int = 0
    last_exit: int = 0

    @classmethod
    def start(cls, name: str, command: list[str], environment: dict[str, str]) -> "_Child":
        return cls(name, command, environment, _spawn(command, environment), time.monotonic())

    def look(self) -> None:
        """Start it again if it has ended: at once, or after a while if it does so all the time."""
        code = self.process.poll()
        if code is None:
            return
        wait_s = min(RESTART_MOST_S, RESTART_AFTER_S * 2**self.quick_deaths) if self.quick_deaths else 0.0
        if time.monotonic() < self.started_at + wait_s:
            return
        log.warning("the %s ended (exit code %s) and is started again", self.name, code)
        self.quick_deaths = 0 if time.monotonic() > self.started_at + LASTED_S else self.quick_deaths + 1
        self.last_exit = code
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process, self.started_at = _spawn(self.command, self.environment), time.monotonic()


def _spawn(command: list[str], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    # A session of its own: Ctrl-C in the terminal reaches only the owner, which ends the others in order.
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)


class Tree:
    """What this process has started. `close()` ends it in order; the end of this process does too."""

    def __init__(self) -> None:
        self._owner_pid = os.getpid()
        self._children: dict[str, _Child] = {}
        self._server: embedded.EmbeddedServer | None = None
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        atexit.register(self.close)

    def start_server(
        self, folder: Path | None, namespace: str = "ms", meanwhile: Callable[[], object] = lambda: None
    ) -> Settings:
        """Start an embedded server, and call `meanwhile` while it starts; durable in `folder`, temporary without one."""
        self._server = embedded.start(folder, namespace, meanwhile)
        return self._server.settings

    @property
    def has_server(self) -> bool:
        return self._server is not None

    @property
    def server_has_ended(self) -> bool:
        """Was there a server of ours that ended by itself? It is not started again: its clients know its old port."""
        return self._server is not None and self._server.guard.poll() is not None

    @property
    def trouble(self) -> str:
        """What keeps ending as soon as it starts, in words; empty if nothing does."""
        for child in self._children.values():
            if child.quick_deaths >= HOPELESS_AFTER:
                return f"the {child.name} ends as soon as it starts (exit code {child.last_exit}); its output above says why"
        return ""

    def has(self, name: str) -> bool:
        return name in self._children

    def start(self, name: str, arguments: list[str], settings: Settings) -> None:
        """Start `millstream ARGUMENTS` as a child and keep it running. Twice is as once."""
        if self.has(name):
            return
        command = [sys.executable, "-m", "millstream", *arguments, "--owned"]
        environment = {**os.environ, **settings.to_environment()}
        self._children[name] = _Child.start(name, command, environment)
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="millstream-tree", daemon=True)
            self._watcher.start()

    def _watch(self) -> None:
        while not self._closing.wait(LOOK_EVERY_S):
            for child in list(self._children.values()):
                child.look()

    def close(self, timeout_s: float = 30.0) -> None:
        """End the children: first what decides and shows, then what runs replicas, the server last. Twice is as once."""
        if self._closing.is_set() or os.getpid() != self._owner_pid:
            return
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join()
        atexit.unregister(self.close)
        deadline = time.monotonic() + timeout_s
        for name in ("dashboard", "autoscaler", "launcher"):
            if (child := self._children.pop(name, None)) is not None:
                _end(child.process, deadline)
        if self._server is not None:
            _end(self._server.guard, deadline)


def _end(child: "subprocess.Popen[bytes]", deadline: float) -> None:
    if child.stdin is not None:
        with contextlib.suppress(OSError):
            child.stdin.close()
    try:
        child.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
