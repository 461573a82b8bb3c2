"""Runs an embedded server and ends it when its owner is gone.

    python -m millstream.guard BINARY FOLDER LOCK [--temporary]

The owner holds the other end of our stdin. At its end (closed, exited, killed) we let the launcher and the replicas
finish, then stop the server in order. LOCK is the open, locked file of the folder: we and the server hold it to our ends.
Only the standard library: this process should be small and up at once.
"""

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

LAST_CLIENTS_S = 25.0  # longer than graceful_shutdown_timeout_s by default: replicas must be able to say goodbye
PR_SET_PDEATHSIG = 1


def main() -> None:
    binary, folder, lock = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    server = subprocess.Popen(
        [binary, str(folder / "server.conf")],
        stdin=subprocess.DEVNULL,
        preexec_fn=_end_with_parent,  # noqa: PLW1509 - this process has no threads
        pass_fds=[lock],
    )
    told_to_end: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told_to_end.append(number))
    try:
        _wait_for_the_end(server, folder, told_to_end)
    finally:
        _take_back_the_advert(folder)
        if "--temporary" in sys.argv:
            shutil.rmtree(folder, ignore_errors=True)


def _wait_for_the_end(server: "subprocess.Popen[bytes]", folder: Path, told_to_end: list[int]) -> None:
    while server.poll() is None:
        # SIGTERM is no shorter way out: systemd sends it to all of a service at once, replicas included.
        if told_to_end or not _owner_lives(timeout_s=0.2):
            _take_back_the_advert(folder)  # first: nobody should join a server that is about to end
            _wait_for_the_last_client(folder)
            server.terminate()
            try:
                server.wait(10.0)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            return


def _take_back_the_advert(folder: Path) -> None:
    (folder / "server.json").unlink(missing_ok=True)


def _owner_lives(timeout_s: float) -> bool:
    import select

    readable, _, _ = select.select([0], [], [], timeout_s)
    return not readable or os.read(0, 1) != b""


def _wait_for_the_last_client(folder: Path) -> None:
    configuration = (folder / "server.conf").read_text()
    port = int(re.search(r"^port (\d+)", configuration, re.MULTILINE)[1])  # type: ignore[index]
    password = re.search(r"^requirepass (\S+)", configuration, re.MULTILINE)[1]  # type: ignore[index]
    deadline = time.monotonic() + LAST_CLIENTS_S
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1.0) as sock:
                sock.sendall(f"AUTH {password}\r\nCLIENT LIST\r\n".encode())
                time.sleep(0.02)
                listing = sock.recv(1 << 20).decode(errors="replace")
        except OSError:
            return
        if not re.search(r" name=ms:(launcher|reads|writes):", listing):
            return
        time.sleep(0.05)


def _end_with_parent() -> None:
    """In the server's process, before it is one: it must not outlive a guard that is killed (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main()
