"""A dashboard of one test: served over a real socket until the block ends."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import httpx

from millstream.config import Settings
from millstream.dashboard.server import serve
from tests.helpers import wait_until
from tests.servers import free_port


@asynccontextmanager
async def serve_dashboard(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of it."""
    port = free_port()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve, settings, "127.0.0.1", port)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            await wait_until(lambda: _is_up(client))
            yield client
        tasks.cancel_scope.cancel()


async def _is_up(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/healthz")).status_code == 200
    except httpx.ConnectError:
        return False
