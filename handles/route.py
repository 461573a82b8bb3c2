"""What an engine keeps per deployment, and of each request: where it goes, who waits for it, what is not sent yet."""

import asyncio
from dataclasses import dataclass
from typing import Any, Protocol

from millstream.broker.codec import Codec, codec_for
from millstream.broker.keys import DeploymentKeys, Keys
from millstream.config import Settings


class Pending(Protocol):
    """Somebody who waits for the end of one request: a Cell, or the future of a `call`."""

    codec: Codec
    ref: bytes
    since: float

    def settle(self, stored: bytes) -> None: ...
    def fail(self, error: BaseException) -> None: ...
    def match(self) -> None: ...


class Route:
    """The engine's way to one deployment: its keys, and what is to be submitted there next."""

    __slots__ = (
        "buffer", "buffered_bytes", "codec", "in_the_air", "is_preparing", "is_ready", "keys", "tag", "unacknowledged",
    )  # fmt: skip

    def __init__(self, settings: Settings, tag: str) -> None:
        self.tag = tag
        self.keys: DeploymentKeys = Keys(settings.namespace).deployment(tag)
        self.codec = codec_for(settings.secret_key, settings.namespace, tag)
        self.is_ready = False  # replies of this deployment reach us
        self.is_preparing = False
        self.buffer: list[Any] = []
        self.buffered_bytes = 0
        self.in_the_air = 0
        self.unacknowledged: set[Batch] = set()


class Batch:
    """One submit call that has not been answered."""

    __slots__ = ("requests",)

    def __init__(self, requests: list[Any]) -> None:
        self.requests = requests


@dataclass(frozen=True, slots=True)
class Hold:
    """A request that must wait in the server, for refs or for its time, until the server has it."""

    route: Route
    pending: Pending
    method: bytes
    envelope: bytes
    depends_on: list[str]
    delay_s: float
    acknowledged: asyncio.Future[None]  # or failed
