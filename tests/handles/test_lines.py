"""The connections of an engine: whatever is lost when, there are others soon."""

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest

from millstream.broker.connection import Control
from millstream.config import Settings
from millstream.handles import engines, lines
from millstream.handles.engine import Engine
from tests.helpers import wait_until
from tests.replica_helpers import Serving, cut
from tests.tls import start_tls_server

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


class Nobody:
    """Uses lines, and does nothing about what it hears of them."""

    def on_message(self, message: bytes) -> None: ...
    async def on_first_dial(self) -> None: ...
    async def on_back(self) -> None: ...
    def on_lost(self) -> None: ...
    def on_failed_try(self, error: Exception) -> None: ...
    def on_tick(self) -> None: ...


def test_loop_ends_in_order_though_the_server_does_not_say_goodbye(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Over TLS; uvloop reports a connection that is open when its loop ends, and that is an error in tests."""
    monkeypatch.setattr(lines, "GOODBYE_S", 0.1)
    tls = start_tls_server(tmp_path)

    async def connect_and_close() -> bool:
        ours = lines.Lines(Settings(tls.url()), "test", Nobody())
        link = await ours.link()
        tls.server.freeze()
        ours.close()
        await ours.until_ended()
        return link.lost.done()

    loop = engines.new_loop()
    try:
        is_closed = loop.run_until_complete(connect_and_close())
        tls.server.thaw()
        with tls.server.connect_blocking() as client:
            client.ping()
            client.ping()  # so its goodbye is there, too late
        loop.close()
    finally:
        tls.server.stop()
    gc.collect()

    assert is_closed
    assert capfd.readouterr().err == ""
