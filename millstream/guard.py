"""Runs an embedded server and ends it when its owner is gone.

    python -I -S millstream/guard.py BINARY FOLDER LOCK [--temporary]

The owner holds the other end of our stdin. At its end (closed, exited, killed) we let the launcher and the replicas
finish, then stop the server in order. LOCK is the open, locked file of the folder: we and the server hold it to our ends.
Only the standard library, and without site-packages: the owner waits until the server is up, and this comes first.
"""

import os
import select
import sys
import time

LAST_CLIENTS_S = 25.0  # longer than graceful_shutdown_timeout_s by default: replicas must be able to say goodbye
STOP_S = 10.0
PR_SET_PDEATHSIG, SIGTERM = 1, 15  # to import `signal` takes a quarter of the time until the server starts


def main() -> None:
    binary, folder, lock = sys.argv[1], sys.argv[2], int(sys.argv[3])
    is_temporary = "--temporary" in sys.argv
    server = os.fork()
    if server == 0:
        _become_the_server(binary, folder, lock)
    import signal  # from here on while the server starts

    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    told_to_end: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told_to_end.append(number))
    try:
        _wait_for_the_end(server, folder, told_to_end, is_temporary=is_temporary)
    finally:
        _take_back_the_advert(folder)
        if is_temporary:
            import shutil

            shutil.rmtree(folder, ignore_errors=True)


def _become_the_server(binary: str, folder: str, lock: int) -> None:
    """In the forked child; never returns."""
    try:
        if sys.platform == "linux":  # it must not outlive a guard that is killed
            import ctypes

            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGTERM)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.set_inheritable(lock, True)
        os.execv(binary, [binary, f"{folder}/server.conf"])
    finally:
        os._exit(127)


def _wait_for_the_end(server: int, folder: str, told_to_end: list[int], *, is_temporary: bool) -> None:
    while not _has_ended(server):
        # SIGTERM is no shorter way out: systemd sends it to all of a service at once, replicas included.
        if told_to_end or not _owner_lives(timeout_s=0.2):
            _take_back_the_advert(folder)  # first: nobody should join a server that is about to end
            _wait_for_the_last_client(folder)
            _stop(server, is_temporary=is_temporary)
            return


def _stop(server: int, *, is_temporary: bool) -> None:
    """In order, which takes a valkey-server 100 ms; at once where there is nothing to save."""
    import signal

    if not is_temporary:
        os.kill(server, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline:
            if _has_ended(server):
                return
            time.sleep(0.01)
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)


def _has_ended(server: int) -> bool:
    return os.waitpid(server, os.WNOHANG)[0] != 0


def _take_back_the_advert(folder: str) -> None:
    if os.path.exists(f"{folder}/server.json"):
        os.unlink(f"{folder}/server.json")


def _owner_lives(timeout_s: float) -> bool:
    readable, _, _ = select.select([0], [], [], timeout_s)
    return not readable or os.read(0, 1) != b""


def _wait_for_the_last_client(folder: str) -> None:
    import re
    import socket

    with open(f"{folder}/server.conf") as file:
        configuration = file.read()
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


if __name__ == "__main__":
    main()
