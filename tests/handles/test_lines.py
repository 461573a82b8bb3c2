"""The connections of an engine: whatever is lost when, there are others soon."""

import asyncio
from typing import Any

import pytest

from millstream.broker.connection import Control
from millstream.handles import engines, lines
from millstream.handles.engine import Engine
from tests.helpers import wait_until
from tests.replica_helpers import Serving, cut

pytestmark = [pytest.mark.anyio, pytest.mark.on_cluster]


async def double(x: int) -> int:
    return 2 * x


@pytest.mark.parametrize("what", ["client", "replies"])
async def test_connection_that_is_lost_while_the_engine_catches_up_is_replaced_at_once(
    serving: Serving, redis: Control, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Catching up needs a connection, and waits for one; the one who makes connections must not wait for that."""
    monkeypatch.setattr(lines, "LOOK_EVERY_S", 0.02)
    handle = serving(double)
    assert await handle.call(1) == 2
    catching_up, original = asyncio.Event(), Engine.on_back

    async def on_back(self: Engine) -> Any:
        if not catching_up.is_set():
            catching_up.set()
            await cut(redis, f"ms:{what}:")
            await wait_until(lambda: not self.lines.is_connected)
            await self.lines.link()
        await original(self)

    monkeypatch.setattr(Engine, "on_back", on_back)
    await cut(redis, f"ms:{what}:")
    await catching_up.wait()

    assert await asyncio.wait_for(handle.call(2), 5) == 4
    await wait_until(lambda: engines.current().lines.is_connected)


async def test_engine_can_be_closed_while_it_catches_up(
    serving: Serving, redis: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = serving(double)
    assert await handle.call(1) == 2
    catching_up, ended = asyncio.Event(), asyncio.Event()

    async def on_back(self: Engine) -> None:
        catching_up.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    monkeypatch.setattr(Engine, "on_back", on_back)
    await cut(redis, "ms:client:")
    await catching_up.wait()

    engines.current().close()

    await asyncio.wait_for(ended.wait(), 5)
