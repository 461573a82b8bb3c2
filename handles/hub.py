"""What the parts of an engine see of each other: the engine joins them, and none of them imports it."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, Protocol

from millstream.broker.link import Link
from millstream.broker.scripts import Submitted
from millstream.config import Settings
from millstream.handles.deadlines import Deadlines
from millstream.handles.drops import Drops
from millstream.handles.lines import Lines
from millstream.handles.route import Pending, Route


class Sender(Protocol):
    """The submitter, as the chores see it."""

    sent: int

    async def ready(self, route: Route) -> Link: ...
    async def under_way(self, route: Route, ref: bytes) -> None: ...
    async def offer(self, route: Route, request: tuple[bytes, bytes, bytes, bytes, bytes]) -> Submitted: ...
    def refused(self, route: Route, refs: Iterable[bytes], reason: BaseException) -> None: ...


class Hub(Protocol):
    """The engine, as its parts see it."""

    settings: Settings
    loop: asyncio.AbstractEventLoop
    name: str
    lines: Lines
    pending: dict[bytes, Pending]
    unregistered: set[bytes]
    deadlines: Deadlines
    drops: Drops

    @property
    def sender(self) -> Sender: ...
    def start(self, chore: Coroutine[Any, Any, Any]) -> None: ...
    def route(self, tag: str) -> Route: ...
    def known_route(self, tag: str) -> Route | None: ...
    def made(self, ref: bytes) -> bool: ...
    def may_be_on_its_way(self, route: Route, ref: bytes) -> bool: ...
    def take_back(self, route: Route, ref: bytes) -> bool: ...
    def join(self, pending: Pending) -> Pending: ...
    def look_at(self, route: Route, refs: list[bytes], *, listen: bool = False) -> None: ...
    def answered(self, pending: Pending, answer: bytes) -> None: ...
    def settle(self, pending: Pending, stored: bytes, large: bytes | None = None) -> None: ...
