"""The connections of an engine, and their reconnects: commands go out on one, results and notices come in on another.

Large values have connections of their own (`bulk`), so that they delay nothing else.
"""

import asyncio
import time
from typing import Any, Protocol

from millstream.broker.bulk import Bulk
from millstream.broker.call import Call
from millstream.broker.cluster import dial_everywhere
from millstream.broker.connection import backoff
from millstream.broker.link import Link
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError

PATIENCE_S = 30.0  # how long requests that no server has acknowledged survive an outage
LOOK_EVERY_S = 0.5
GOODBYE_S = 0.5


class User(Protocol):
    """Who uses the lines, and hears of them."""

    def on_message(self, message: bytes) -> None: ...
    async def on_first_dial(self) -> None: ...
    async def on_back(self) -> None: ...
    def on_lost(self) -> None: ...
    def on_failed_try(self, error: BrokerUnavailableError) -> None: ...
    def on_tick(self) -> None: ...


class Lines:
    """Connects at first use and then stays connected until `close()`. Both links are dropped when one is lost."""

    def __init__(self, settings: Settings, name: str, user: User) -> None:
        self._settings, self._name, self._user = settings, name, user
        self._loop = asyncio.get_running_loop()
        self.commands: Link | None = None
        self.replies: Link | None = None
        self.bulk = Bulk(settings, name, patience_s=PATIENCE_S)
        self._connector: asyncio.Task[None] | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._leaving: list[Link] = []  # after `close`
        self.is_closed = False

    @property
    def has_been_up(self) -> bool:
        """Has there ever been a connection? Until then, a failure to connect is final for whoever asked."""
        return self._connector is not None

    @property
    def is_connected(self) -> bool:
        """Are both links up? One that has just been lost stays for a few passes of the loop, until the connector wakes."""
        commands, replies = self.commands, self.replies
        return commands is not None and commands.is_up and replies is not None and replies.is_up

    def run(self, call: Call[Any]) -> asyncio.Future[Any]:
        """Run a script; BrokerUnavailableError in the future when there is no connection."""
        if self.commands is None:
            future: asyncio.Future[Any] = self._loop.create_future()
            future.set_exception(BrokerUnavailableError("the connection to the server is down"))
            return future
        return self.commands.run(call)

    async def link(self) -> Link:
        """The commands link; waits for it up to PATIENCE_S, but a first connection that fails raises at once."""
        if self.is_closed:
            raise BrokerUnavailableError("this connection was closed; call again to open a new one")
        if self._connector is None:
            await self._connect()
            self._connector = self._connector or self._loop.create_task(self._stay_connected())
        give_up = time.monotonic() + PATIENCE_S
        while not self.is_connected:
            if time.monotonic() > give_up:
                raise BrokerUnavailableError(f"the server did not come back within {PATIENCE_S:.0f} s")
            await asyncio.sleep(0.01)
        assert self.commands is not None
        return self.commands

    def close(self) -> None:
        """Close the links for good; what was sent last still goes out."""
        self.is_closed = True
        self._leaving = [link for link in (self.commands, self.replies) if link is not None]
        if self.commands is not None:
            self.commands.finish()
            self.commands = None
        for task in (self._connector, self._connecting):
            if task is not None:
                task.cancel()
        self._drop()
        self.bulk.close()

    async def until_ended(self) -> None:
        """After `close`, and before the end of the loop: TLS says goodbye to the server, and hears its answer."""
        if ends := [end for link in self._leaving for end in link.ends()]:
            await asyncio.wait(ends, timeout=GOODBYE_S)
            for link in self._leaving:
                link.close()  # of a server that does not answer
            await asyncio.wait(ends, timeout=GOODBYE_S)

    async def _connect(self) -> None:
        if self._connecting is None:
            self._connecting = self._loop.create_task(self._dial_both())
        connecting = self._connecting
        try:
            await asyncio.shield(connecting)
        finally:
            if self._connecting is connecting and connecting.done():
                self._connecting = None

    async def _dial_both(self) -> None:
        if self._connector is None:
            await self._user.on_first_dial()
        commands = await dial_everywhere(self._settings, f"ms:client:{self._name}")
        try:
            replies = await dial_everywhere(self._settings, f"ms:replies:{self._name}", self._user.on_message)
        except BaseException:
            commands.close()
            raise
        self.commands, self.replies = commands, replies

    def _drop(self) -> None:
        for link in (self.commands, self.replies):
            if link is not None:
                link.close()
        self.commands = self.replies = None
        self._user.on_lost()

    async def _stay_connected(self) -> None:
        while True:
            await self._until_lost()
            self._drop()
            for delay_s in backoff():
                try:
                    await self._connect()
                    break
                except BrokerUnavailableError as e:
                    self._user.on_failed_try(e)
                    await asyncio.sleep(delay_s)
            await self._catch_up()

    async def _catch_up(self) -> None:
        """Let our user do what follows a reconnect. It may wait for a connection, which nobody but we would make: one that
        is lost meanwhile ends this, and the next one starts it over."""
        links = [link for link in (self.commands, self.replies) if link is not None]
        catching_up = self._loop.create_task(self._user.on_back())
        try:
            await asyncio.wait([catching_up, *(link.lost for link in links)], return_when=asyncio.FIRST_COMPLETED)
        finally:
            catching_up.cancel()
        if catching_up.done():
            catching_up.result()

    async def _until_lost(self) -> None:
        links = [link for link in (self.commands, self.replies) if link is not None]
        while all(link.is_up for link in links) and links:
            lost = [link.lost for link in links]
            await asyncio.wait(lost, timeout=LOOK_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            self._user.on_tick()
