"""The dashboard's process: a listener on loopback, a client of the server, and the application between them."""

import contextlib
import ipaddress
import logging
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import anyio
import uvicorn

from millstream.broker.connection import open_control
from millstream.broker.registry import Registry
from millstream.config import Settings
from millstream.dashboard.app import LOOPBACK_HOSTS, make_app
from millstream.dashboard.feed import Feed
from millstream.dashboard.reading import look
from millstream.errors import ConfigError

CLOSE_WITHIN_S = 2  # for answers under way, when the dashboard ends
log = logging.getLogger("millstream.dashboard")

# Logging is the caller's, as signals are, and one line per request is not an event.
OPTIONS: dict[str, Any] = {
    "access_log": False, "log_config": None, "log_level": "warning", "server_header": False,
    "lifespan": "off", "ws": "none", "timeout_graceful_shutdown": CLOSE_WITHIN_S,
}  # fmt: skip


async def serve(settings: Settings, host: str, port: int) -> None:
    """Serve the dashboard until cancelled. It starts and stays up whether the Redis server answers or not.

    Raises ConfigError for a host that is not loopback and for a port that is taken. Signals are the caller's.
    """
    listener = _listen(host, port)
    client = open_control(settings, "ms:dashboard")
    try:
        feed = Feed(settings, partial(look, client, settings))
        app = make_app(feed, Registry(client, settings), LOOPBACK_HOSTS | {host.lower()})
        log.info("the dashboard is at %s", _url(host, listener))
        await _run(uvicorn.Config(app, **OPTIONS), listener, feed)
    finally:
        listener.close()
        with anyio.CancelScope(shield=True), anyio.move_on_after(1.0):
            await client.aclose()


async def _run(config: uvicorn.Config, listener: socket.socket, feed: Feed) -> None:
    """Run uvicorn; when cancelled, let it close its connections in order first."""
    server = _Server(config)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_shielded, server, listener)
        try:
            await anyio.sleep_forever()
        finally:
            feed.close()
            server.should_exit = True


async def _shielded(server: uvicorn.Server, listener: socket.socket) -> None:
    with anyio.CancelScope(shield=True):  # bounded by CLOSE_WITHIN_S once should_exit is set
        await server.serve(sockets=[listener])


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the caller's; who started us cancels us."""
        yield


def _listen(host: str, port: int) -> socket.socket:
    family, address = _loopback(host)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart must not wait for TIME_WAIT
        listener.bind((address, port))
        listener.listen(128)
    except OSError as e:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {e.strerror}; choose another port with --port, or end what uses it"
        ) from e
    listener.setblocking(False)
    return listener


def _loopback(host: str) -> tuple[socket.AddressFamily, str]:
    """The address to bind. ConfigError unless all that `host` stands for is loopback: there is no login here."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as e:
        raise ConfigError(f"host {host!r} is no address: {e}; use 127.0.0.1 or ::1") from e
    addresses = [(family, str(address[0])) for family, _, _, _, address in found]
    foreign = [text for _, text in addresses if not ipaddress.ip_address(text.partition("%")[0]).is_loopback]
    if foreign:
        raise ConfigError(
            f"host {host!r} is not loopback ({foreign[0]}): the dashboard has no login and listens on this machine only; "
            "use 127.0.0.1 and reach it from elsewhere with `ssh -L`"
        )
    return min(addresses)  # IPv4 first: `localhost` is written more often than meant


def _url(host: str, listener: socket.socket) -> str:
    name = f"[{host.strip('[]')}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}/"
