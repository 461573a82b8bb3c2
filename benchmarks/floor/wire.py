"""What both sides of the floor share: a connection, and the names of the two keys."""

import asyncio
from collections.abc import Callable
from typing import Any

import hiredis

REQUESTS, REPLIES = "floor:requests", "floor:replies"
pack: Callable[[tuple[Any, ...]], bytes] = hiredis.pack_command


class Link(asyncio.Protocol):
    """One connection. What the server says goes to `on_reply`, one reply at a time."""

    def __init__(self, on_reply: Callable[[Any], None]) -> None:
        self._reader, self._on_reply = hiredis.Reader(), on_reply

    def connection_made(self, transport: Any) -> None:
        self.write, self.close = transport.write, transport.close

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            self._on_reply(reply)


async def connect(port: int, on_reply: Callable[[Any], None]) -> Link:
    return (await asyncio.get_running_loop().create_connection(lambda: Link(on_reply), "127.0.0.1", port))[1]
