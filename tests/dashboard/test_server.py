"""The dashboard over a real socket: where it listens, how it ends, and what it does while its server is away."""

import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from millstream.broker.connection import Control
from millstream.config import Settings
from millstream.dashboard.server import serve
from millstream.errors import ConfigError
from tests.dashboard.seeding import seed_shop
from tests.dashboard.serving import serve_dashboard
from tests.helpers import wait_until
from tests.servers import Server
from tests.timing import timed

pytestmark = [pytest.mark.anyio, pytest.mark.processes, pytest.mark.any_server]
NOWHERE = Settings("redis://127.0.0.1:1")


async def events(answer: httpx.Response) -> AsyncIterator[Any]:
    async for line in answer.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "10.1.2.3"])
async def test_host_beyond_this_machine_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="not loopback"):
        await serve(NOWHERE, host, 0)


async def test_host_that_is_no_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="is no address"):
        await serve(NOWHERE, "no such host", 0)


async def test_port_in_use_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use; choose"):
            await serve(NOWHERE, "127.0.0.1", port)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_it_listens_on_loopback_only(host: str) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve, NOWHERE, host, 0)
        await wait_until(lambda: bool(_listening()))
        addresses = _listening()
        tasks.cancel_scope.cancel()

    assert addresses == {"0100007F"}  # 127.0.0.1, as the kernel writes it


def _listening() -> set[str]:
    """The addresses on which this process listens over TCP, IPv4 and IPv6."""
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and link.exists()]
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    rows = [
        row.split() for table in ("tcp", "tcp6") for row in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]
    ]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


async def test_signals_stay_with_the_caller() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    async with serve_dashboard(NOWHERE):
        during = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    assert during == before


@timed
async def test_cancelling_ends_it_soon_although_a_client_listens() -> None:
    async with serve_dashboard(NOWHERE) as http, http.stream("GET", "/api/live") as answer:
        await anext(events(answer))
        cancelled_at = time.monotonic()

    assert time.monotonic() - cancelled_at < 2.0


async def test_other_host_header_is_refused_over_the_wire() -> None:
    async with serve_dashboard(NOWHERE) as http:
        answer = await http.get("/api/snapshot", headers={"host": "evil.example"})

    assert answer.status_code == 403


async def test_live_sends_a_snapshot_at_once_and_one_each_second(settings: Settings, redis: Control) -> None:
    await seed_shop(redis, settings)

    async with serve_dashboard(settings) as http, http.stream("GET", "/api/live") as answer:
        stream = events(answer)
        first, second = await anext(stream), await anext(stream)

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert len(first["snapshot"]["deployments"]) == 3
    assert 500 < second["snapshot"]["taken_ms"] - first["snapshot"]["taken_ms"] < 3000
    assert second["snapshot"]["deployments"][1]["arrivals_per_s"] == 0.0


async def test_server_is_left_alone_when_nobody_looks(settings: Settings, redis: Control) -> None:
    async with serve_dashboard(settings) as http:
        async with http.stream("GET", "/api/live") as answer:
            await anext(events(answer))
        await anyio.sleep(1.2)  # the look that was under way
        before = await _commands(redis)
        await anyio.sleep(1.5)

        assert await _commands(redis) - before <= 2  # our own INFO


async def _commands(redis: Control) -> int:
    info: Any = await redis.info("stats")
    return int(info["total_commands_processed"])


async def test_server_that_goes_and_comes_back_is_followed(start_server: Callable[..., Server]) -> None:
    server = start_server("--appendonly", "yes")
    settings = Settings(server.url, secret_key=b"a secret for tests")
    async with server.connect() as client:
        await seed_shop(client, settings)

    async with serve_dashboard(settings) as http, http.stream("GET", "/api/live") as answer:
        stream = events(answer)
        known = await anext(stream)
        server.kill()
        while not (lost := await anext(stream))["error"]:
            pass
        refused = await http.get("/api/snapshot")
        server.start()
        while (found := await anext(stream))["error"]:
            pass
        accepted = await http.get("/api/snapshot")

    assert known["error"] == ""
    assert "cannot reach the server" in lost["error"]
    assert lost["snapshot"]["deployments"] and lost["age_s"] > 0
    assert (refused.status_code, refused.json()["error"]) == (503, lost["error"])
    assert len(found["snapshot"]["deployments"]) == 3
    assert accepted.status_code == 200
