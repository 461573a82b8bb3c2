"""The server of a run: a process of our own with an AOF, ended in the way of the run and started again on its data."""

import signal
import socket
import subprocess
import time
from collections import deque
from pathlib import Path

from chaos.plan import ServerFaults
from millstream.embedded import find_server_binary

START_TIMEOUT_S = 60.0  # it loads its data meanwhile
LOSES_S = 1.0  # of the AOF, where the host loses its power: everysec means that so much may not be on the disk
SAMPLE_S = 0.05


class Server:
    def __init__(self, folder: Path, port: int, how: ServerFaults) -> None:
        self._folder, self.port, self._how = folder, port, how
        self._sizes: deque[tuple[float, int]] = deque(maxlen=round(2 * LOSES_S / SAMPLE_S))
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir()

    @property
    def loses_data(self) -> bool:
        return self._how is ServerFaults.KILL_EVERYSEC

    def start(self) -> None:
        """Start it, and wait until it has loaded its data. RuntimeError with its log if it does not come up."""
        command = [
            str(find_server_binary()), "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._folder),
            "--save", "", "--appendonly", "yes", "--daemonize", "no",
            "--appendfsync", "always" if self._how is ServerFaults.KILL_ALWAYS else "everysec",
            *(["--auto-aof-rewrite-percentage", "0"] if self.loses_data else []),  # one file, whose end is cut off
        ]  # fmt: skip
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{(self._folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)
        self._sizes.clear()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False

    def look(self) -> None:
        """Note how long the AOF is now; to be called every SAMPLE_S."""
        if self._process is None or not self.loses_data:
            return
        if not self._sizes or time.monotonic() - self._sizes[-1][0] >= SAMPLE_S:
            self._sizes.append((time.monotonic(), sum(file.stat().st_size for file in self._incremental())))

    def restart(self, after_s: float) -> None:
        """End it in the way of this run, and start it again after a while."""
        self._end()
        time.sleep(after_s)
        self.start()

    def _end(self) -> None:
        self._signal(signal.SIGTERM if self._how is ServerFaults.ORDERLY else signal.SIGKILL)
        if self.loses_data:
            self._lose_the_end()

    def stop(self) -> None:
        if self._process is not None:
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        process, self._process = self._process, None
        process.send_signal(number)
        process.wait(30)

    def _lose_the_end(self) -> None:
        """The AOF is as long as it was LOSES_S ago."""
        before = [size for at_s, size in self._sizes if at_s <= time.monotonic() - LOSES_S]
        (file,) = self._incremental()
        if before:
            with file.open("r+b") as aof:
                aof.truncate(before[-1])

    def _incremental(self) -> list[Path]:
        return list(self._folder.glob("appendonlydir/*.incr.aof"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
