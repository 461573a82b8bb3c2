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
from pathlib import Path

from millstream import embedded
from millstream.config import Settings

LOOK_EVERY_S = 0.25
RESTART_AFTER_S = 0.5  # doubled each time for a child that dies again and again
RESTART_MOST_S = 10.0
log = logging.getLogger("millstream")


class Tree:
    """What this process has started. `close()` ends it in order; the end of this process does too."""

    def __init__(self) -> None:
        self._owner_pid = os.getpid()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, tuple[list[str], dict[str, str]]] = {}
        self._server: embedded.EmbeddedServer | None = None
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        atexit.register(self.close)

    def start_server(self, folder: Path | None, namespace: str = "ms") -> Settings:
        """Start an embedded server; durable in `folder`, temporary without one."""
        self._server = embedded.start(folder, namespace)
        return self._server.settings

    @property
    def has_server(self) -> bool:
        return self._server is not None

    @property
    def server_has_ended(self) -> bool:
        """Was there a server of ours that ended by itself? It is not started again: its clients know its old port."""
        return self._server is not None and self._server.guard.poll() is not None

    def has(self, name: str) -> bool:
        return name in self._children

    def start(self, name: str, arguments: list[str], settings: Settings) -> None:
        """Start `millstream ARGUMENTS` as a child and keep it running. Twice is as once."""
        if self.has(name):
            return
        command = [sys.executable, "-m", "millstream", *arguments, "--owned"]
        self._commands[name] = (command, {**os.environ, **settings.to_environment()})
        self._spawn(name)
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="millstream-tree", daemon=True)
            self._watcher.start()

    def _spawn(self, name: str) -> None:
        command, environment = self._commands[name]
        if (before := self._children.get(name)) is not None and before.stdin is not None:
            before.stdin.close()
        # A session of its own: Ctrl-C in the terminal reaches only the owner, which ends the others in order.
        self._children[name] = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)

    def _watch(self) -> None:
        delays: dict[str, float] = {}
        not_before: dict[str, float] = {}
        while not self._closing.wait(LOOK_EVERY_S):
            for name, child in list(self._children.items()):
                if child.poll() is None or self._closing.is_set() or time.monotonic() < not_before.get(name, 0.0):
                    continue
                log.warning("the %s ended (exit code %s) and is started again", name, child.returncode)
                self._spawn(name)
                has_lasted = time.monotonic() > not_before.get(name, 0.0) + 10 * RESTART_MOST_S
                delays[name] = RESTART_AFTER_S if has_lasted else min(RESTART_MOST_S, 2 * delays[name])
                not_before[name] = time.monotonic() + delays[name]

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
            _end(self._children.pop(name, None), deadline)
        if self._server is not None:
            _end(self._server.guard, deadline)


def _end(child: "subprocess.Popen[bytes] | None", deadline: float) -> None:
    if child is None:
        return
    if child.stdin is not None:
        with contextlib.suppress(OSError):
            child.stdin.close()
    try:
        child.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
