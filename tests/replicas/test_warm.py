"""What a warm parent does before it forks."""

import asyncio
import os
from collections.abc import Callable

import pytest

from millstream.broker.connection import DOWN
from millstream.config import Settings
from millstream.replicas import warm
from tests.servers import Server

pytestmark = pytest.mark.anyio


async def test_application_is_read_once_the_server_is_back(start_server: Callable[..., Server]) -> None:
    """Else an outage at that moment would be blamed on the application, and the deployment would fail for good."""
    server = start_server()
    settings = Settings(server.url)
    server.kill()

    reading = asyncio.create_task(warm._fetch(settings, ["app.NotThere"]))
    done, _ = await asyncio.wait([reading], timeout=0.3)
    assert not done

    await asyncio.to_thread(server.start)
    assert await asyncio.wait_for(reading, 20) == {}


async def test_application_that_cannot_be_read_is_given_up_when_the_launcher_is_gone(
    start_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    settings = Settings(server.url)
    server.kill()
    parents = iter([1234])
    monkeypatch.setattr(os, "getppid", lambda: next(parents, 1))

    with pytest.raises(DOWN):
        await asyncio.wait_for(warm._fetch(settings, ["app.NotThere"]), 20)
