"""What the parts of an engine see of each other: the engine joins them, and none of them imports it."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, Protocol

from millstream.broker.codec import Verified
from millstream.broker.link import Link
from millstream.config import Settings
from millstream.handles.deadlines import Deadlines
from millstream.handles.lines import Lines
from millstream.handles.route import Pending, Route


class Sender(Protocol):
    """The submitter, as the chores see it."""

    sent: int

    def flush(self, route: Route) -> None: ...
    async def ready(self, route: Route) -> Link: ...
    def refused(self, route: Route, refs: Iterable[bytes], reason: BaseException) -> None: ...
    def withdraw(self, route: Route, ref: bytes, error: BaseException) -> None: ...


class Hub(Protocol):
    """The engine, as its parts see it."""

    settings: Settings
    loop: asyncio.AbstractEventLoop
    name: str
    lines: Lines
    pending: dict[bytes, Pending]
    unregistered: set[bytes]
    deadlines: Deadlines

    @property
    def sender(self) -> Sender: ...
    def start(self, chore: Coroutine[Any, Any, Any]) -> None: ...
    def route(self, tag: str) -> Route: ...
    def known_route(self, tag: str) -> Route | None: ...
    def join(self, pending: Pending) -> Pending: ...
    def look_at(self, route: Route, refs: list[bytes], *, listen: bool = False) -> None: ...
    def answered(self, pending: Pending, answer: bytes) -> None: ...
    def settle(self, pending: Pending, stored: bytes, large: Verified | None = None) -> None: ...
