"""How many instructions the server needs for each step of a request, counted by callgrind: the same on any day.

    python -m benchmarks.instructions [--binary redis-server] [--requests 1280]

Needs valgrind. Batches are as large as under load (submit 32, read 50, finish 50), with 700 requests open besides.
"""

import argparse
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hiredis

from millstream.broker import control_scripts, scripts
from millstream.broker.call import Call
from millstream.broker.codec import codec_for
from millstream.broker.keys import GROUP, Keys
from millstream.config import PUBLIC_KEY
from millstream.embedded import find_server_binary

KEYS = Keys("ms").deployment("default.NoOp")
CODEC = codec_for(PUBLIC_KEY, "ms", KEYS.tag)
CLIENT, REPLICA, METHOD = "0123456789abcdef", "r-1", b"__call__"
SUBMIT, READ, FREE = 32, 50, 500  # together
PATIENCE_S = 30.0


class Connection:
    """Commands one by one, and scripts."""

    def __init__(self, port: int) -> None:
        self._socket, self._reader = socket.create_connection(("127.0.0.1", port)), hiredis.Reader()

    def ask(self, *command: Any) -> Any:
        self._socket.sendall(hiredis.pack_command(command))
        while (reply := self._reader.gets()) is False:
            self._reader.feed(self._socket.recv(1 << 20))
        if isinstance(reply, Exception):
            raise reply
        return reply

    def run(self, call: Call[Any]) -> Any:
        try:
            return call.read(self.ask(*call.command()))
        except hiredis.ReplyError:
            return call.read(self.ask(*call.full_command()))


class Counted:
    """A server under callgrind."""

    def __init__(self, binary: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = ("--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", "", "--appendonly", "no")
        self._out = folder / "callgrind"
        self._process = subprocess.Popen(
            ["valgrind", "--tool=callgrind", f"--callgrind-out-file={self._out}", binary, *options],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.connection = self._connected(port)

    def _connected(self, port: int) -> Connection:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                connection = Connection(port)
                connection.ask("PING")
                return connection
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def count(self, step: Callable[[], None]) -> int:
        """The instructions of all that happens during a step."""
        self._control("--zero")
        step()
        self._control("--dump")
        newest = max(self._out.parent.glob("callgrind.*"), key=lambda path: path.stat().st_mtime_ns)
        found = re.search(r"^(?:summary|totals): (\d+)", newest.read_text(errors="replace"), re.MULTILINE)
        assert found is not None, newest
        return int(found[1])

    def _control(self, what: str) -> None:
        subprocess.run(["callgrind_control", what, str(self._process.pid)], check=True, capture_output=True)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


def measure(server: Counted, requests: int) -> dict[str, float]:
    """Instructions per request, by step. Of two rounds the second: the first one loads the scripts."""
    connection = server.connection
    connection.run(control_scripts.groups(KEYS))
    connection.ask("HSET", KEYS.config, "max_attempts", 3, "result_ttl_s", 3600, "version", "v")
    connection.ask("HSET", KEYS.replicas, REPLICA, "{}")
    others = [part for x in range(700) for part in (f"other-{x:016d}", "normal 1700000000000-1")]
    connection.ask("HSET", KEYS.open, *others)
    for number in range(2):
        counted = one_round(server, requests, number)
    return counted


def one_round(server: Counted, requests: int, number: int) -> dict[str, float]:
    connection = server.connection
    refs = [b"%06x%016x" % (number, x) for x in range(requests)]
    sealed = {ref: CODEC.seal("request", ref, b"x" * 30, METHOD) for ref in refs}
    claimed: list[Any] = []

    def submit() -> None:
        for i in range(0, requests, SUBMIT):
            flat = [part for ref in refs[i : i + SUBMIT] for part in (ref, "normal", METHOD, b"", sealed[ref])]
            connection.run(scripts.submit(KEYS, CLIENT, flat))

    def read() -> None:
        group = ("GROUP", GROUP, REPLICA, "COUNT", READ)
        while len(claimed) < requests // 2:
            claimed.extend(connection.ask("XREADGROUP", *group, "STREAMS", KEYS.lane("normal"), ">")[0][1])

    def claim() -> None:
        while len(claimed) < requests:
            claimed.extend(connection.run(scripts.claim(KEYS, REPLICA, READ))[1][0][1])

    def finish() -> None:
        for i in range(0, requests, READ):
            rows = [(entry, flat[1], CLIENT, b"succeeded", sealed[flat[1]]) for entry, flat in claimed[i : i + READ]]
            connection.run(scripts.finish(KEYS, "normal", 3600, [part for row in rows for part in row]))

    def free() -> None:
        for i in range(0, requests, FREE):
            connection.ask("UNLINK", *[KEYS.result_prefix.encode() + ref for ref in refs[i : i + FREE]])

    half = requests / 2
    return {
        "submit": server.count(submit) / requests,
        "read directly": server.count(read) / half,
        "read by the claim script": server.count(claim) / half,
        "finish": server.count(finish) / requests,
        "free the result": server.count(free) / requests,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", help="a Redis or Valkey server; by default the embedded one")
    parser.add_argument("--requests", type=int, default=1280, help="a multiple of 100")
    options = parser.parse_args()
    if not shutil.which("valgrind"):
        sys.exit("this needs valgrind: apt install valgrind")
    binary = options.binary or str(find_server_binary())
    with tempfile.TemporaryDirectory() as folder:
        server = Counted(binary, Path(folder))
        try:
            counted = measure(server, options.requests)
        finally:
            server.stop()
    print(f"{binary}: instructions per request")
    for step, count in counted.items():
        print(f"  {step:28} {count:8,.0f}")


if __name__ == "__main__":
    main()
