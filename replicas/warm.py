"""The warm parent of one application version: imports the user's code once, then forks replicas in milliseconds.

Run by the launcher: `python -m millstream.replicas.warm <socket fd>`. It has neither loop nor threads of its own when it
forks. Where the application has started threads (or holds a CUDA context) it refuses to fork, and the launcher starts a
fresh process per replica, which then becomes that replica.
"""

import asyncio
import gc
import importlib
import logging
import os
import random
import selectors
import signal
import socket
import sys
import threading
import traceback
from typing import Any, NoReturn

from millstream.broker.codec import codec_for
from millstream.broker.connection import DOWN, backoff, open_control
from millstream.broker.definitions import Definition, open_definition
from millstream.broker.registry import Registry
from millstream.broker.tracebacks import user_traceback
from millstream.config import DeploymentConfig, Settings, find_settings
from millstream.replicas.control import Control, PlainControl
from millstream.replicas.replica import Birth, Replica

HARMLESS_THREADS = ("MainThread", "pytest_timeout")


def main() -> None:
    """Serve the launcher's requests until it is gone."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("millstream").setLevel(logging.WARNING)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a Ctrl-C in the terminal is for the owner, who ends us in order
    control = PlainControl(socket.socket(fileno=int(sys.argv[1])))
    settings = find_settings()
    received = control.receive()
    if received is None:
        return
    order, _ = received
    try:
        definitions = asyncio.run(_fetch(settings, order["tags"]))
    except BaseException as e:
        message = f"importing the application raised {type(e).__name__}: {e}"
        control.send({"failed": message, "traceback": user_traceback(e)})
        return
    _title(f"millstream: warm {order['app']}")
    gc.collect()
    gc.freeze()  # what is loaded stays shared with the children
    if order["spawn"]:
        _become_a_replica(control, settings, definitions)
    elif (why := _why_not_fork()) and not order["fork_anyway"]:
        control.send({"cannot_fork": why})
    else:
        control.send({"warm": os.getpid()})
        _Forks(control, settings, definitions).run()


async def _fetch(settings: Settings, tags: list[str]) -> dict[str, Definition]:
    stored = await _read(settings, tags)
    return {
        tag: open_definition(codec_for(settings.secret_key, settings.namespace, tag), sealed)
        for tag, sealed in stored.items()
    }


async def _read(settings: Settings, tags: list[str]) -> dict[str, bytes]:
    """The sealed definitions that there are. An outage of the server is no fault of the application: it is waited out."""
    client, delays, launcher = open_control(settings, "ms:warm"), backoff(), os.getppid()
    registry = Registry(client, settings)
    try:
        while True:
            try:
                stored = {tag: await registry.definition(tag) for tag in tags}
                return {tag: sealed for tag, sealed in stored.items() if sealed is not None}
            except DOWN:
                if os.getppid() != launcher:
                    raise  # who has asked is gone
                await asyncio.sleep(next(delays))
    finally:
        await client.aclose()


def _why_not_fork() -> str:
    """Why a fork of this process would be unsafe; empty if it is not. Threads of native pools (BLAS) handle forks."""
    threads = [t.name for t in threading.enumerate() if t.name not in HARMLESS_THREADS]
    if threads:
        return f"the application started threads while it was imported ({', '.join(threads)})"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "the application created a CUDA context while it was imported"
    return ""


class _Forks:
    """Forks on demand, and reports how its children ended."""

    def __init__(self, control: PlainControl, settings: Settings, definitions: dict[str, Definition]) -> None:
        self._control, self._settings, self._definitions = control, settings, definitions
        self._wakeup_read, self._wakeup_write = os.pipe()
        for fd in (self._wakeup_read, self._wakeup_write):
            os.set_blocking(fd, False)
        self._children: set[int] = set()

    def run(self) -> None:
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler the wakeup pipe stays silent
        signal.set_wakeup_fd(self._wakeup_write)
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ, "order")
            selector.register(self._wakeup_read, selectors.EVENT_READ, "child")
            while True:
                for key, _ in selector.select():
                    if key.data == "child":
                        self._report_ends()
                    elif not self._obey():
                        return

    def _obey(self) -> bool:
        """Carry out the launcher's orders; False when it is gone. Children then drain by themselves."""
        while True:
            received = self._control.receive()
            if received is None:
                return False
            order, files = received
            pid = os.fork()
            if pid == 0:
                self._child(order, files)
            for file in files:
                os.close(file)
            self._children.add(pid)
            self._control.send({"forked": pid, "replica": order["replica"]})
            if not self._control.has_buffered():
                return True

    def _report_ends(self) -> None:
        while self._drain_wakeups():
            pass
        for pid in list(self._children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._children.discard(pid)
                self._control.send({"ended": pid, "how": describe(os.waitstatus_to_exitcode(status))})

    def _drain_wakeups(self) -> bytes:
        try:
            return os.read(self._wakeup_read, 4096)
        except BlockingIOError:
            return b""

    def _child(self, order: dict[str, Any], files: list[int]) -> NoReturn:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(self._control.fileno())
        _live(order, files, self._settings, self._definitions)


def _become_a_replica(control: PlainControl, settings: Settings, definitions: dict[str, Definition]) -> None:
    control.send({"warm": os.getpid()})
    received = control.receive()
    if received is not None:
        order, files = received
        control.send({"forked": os.getpid(), "replica": order["replica"]})
        _live(order, files, settings, definitions)


def _live(order: dict[str, Any], files: list[int], settings: Settings, definitions: dict[str, Definition]) -> NoReturn:
    """Be a replica, in this process, to the end."""
    output, errors, control_fd = files
    os.dup2(output, 1)
    os.dup2(errors, 2)
    for file in (output, errors):
        os.close(file)
    code = 1
    try:
        random.seed()  # siblings must not draw the same numbers
        _title(f"millstream: {order['tag']} {order['replica']}")
        config = DeploymentConfig.from_json(order["config"])
        birth = Birth(order["tag"], order["replica"], order["node"], order["version"], config, order["revision"])
        control = socket.socket(fileno=control_fd)
        code = _loop_run(settings, birth, definitions[order["tag"]], control)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not through the parent's atexit handlers; a thread stuck in user code cannot hold us


def _loop_run(settings: Settings, birth: Birth, definition: Definition, control: socket.socket) -> int:
    async def life() -> int:
        replica = Replica(settings, birth, definition, Control(control))
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, replica.stop)
        return await replica.run()

    from millstream.handles import engines

    engines.use(settings)  # handles in the user's code speak with the same server
    try:
        uvloop = importlib.import_module("uvloop")
    except ImportError:
        return asyncio.run(life())
    return int(uvloop.run(life()))


def describe(code: int) -> str:
    """An exit code in words: what a request's history and the log say of a replica's end."""
    if code < 0:
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    return "exited" if code == 0 else f"exited with code {code}"


def _title(text: str) -> None:
    import setproctitle

    setproctitle.setproctitle(text)


if __name__ == "__main__":
    main()
