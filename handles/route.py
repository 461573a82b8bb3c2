"""What an engine keeps per deployment, and of each request: where it goes, who waits for it, what is not sent yet."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

from millstream.broker.codec import Codec, Sealing, Verified, codec_for
from millstream.broker.keys import DeploymentKeys, Keys
from millstream.broker.pickling import Pickled
from millstream.config import Settings
from millstream.handles.options import with_time_left

FIELDS = 5  # of one request in a submit call: ref, lane, method, extras, envelope
OVERHEAD_BYTES = 200  # of one request in memory, beside its envelope
LATE_S = 0.005  # what leaves so long after it was made has less time left than it says


class Pending(Protocol):
    """Somebody who waits for the end of one request: a Cell, the future of a `call`, or a stream."""

    codec: Codec
    ref: bytes
    since: float
    is_private: bool  # nobody else can know of it: its result can go once it has been heard

    @property
    def is_over(self) -> bool: ...
    def settle(self, stored: bytes, large: Verified | None = None) -> None: ...
    def fail(self, error: BaseException) -> None: ...
    def match(self) -> None: ...
    def item(self, stored: bytes) -> None: ...
    def look_again(self) -> bool: ...


class Several:
    """Several who wait for the same request: refs made of one id, or calls with one idempotency key."""

    __slots__ = ("codec", "is_private", "pendings", "ref", "since")

    def __init__(self, first: Pending) -> None:
        self.pendings = [first]
        self.codec, self.ref, self.since = first.codec, first.ref, first.since
        self.is_private = False

    @classmethod
    def of(cls, known: Pending, another: Pending) -> "Several":
        """Who waits already, and one more."""
        several = known if isinstance(known, Several) else cls(known)
        several.pendings.append(another)
        return several

    @property
    def is_over(self) -> bool:
        return all(pending.is_over for pending in self.pendings)

    def settle(self, stored: bytes, large: Verified | None = None) -> None:
        large = None if large is None else large.shared()
        for pending in self.pendings:
            pending.settle(stored, large)

    def fail(self, error: BaseException) -> None:
        for pending in self.pendings:
            pending.fail(error)

    def match(self) -> None:
        for pending in self.pendings:
            pending.match()

    def item(self, stored: bytes) -> None:
        for pending in self.pendings:
            pending.item(stored)

    def look_again(self) -> bool:
        wants = [pending.look_again() for pending in self.pendings]  # all of them, not up to the first
        return any(wants)


class Route:
    """The engine's way to one deployment: its keys, and what is to be submitted there next."""

    __slots__ = (
        "_sealers",
        "buffer",
        "buffered_bytes",
        "bytes_in_the_air",
        "codec",
        "in_the_air",
        "is_preparing",
        "is_ready",
        "keys",
        "result_prefix",
        "tag",
        "unacknowledged",
        "was_alone",
    )  # fmt: skip

    def __init__(self, settings: Settings, tag: str) -> None:
        self.tag = tag
        self.keys: DeploymentKeys = Keys(settings.namespace).deployment(tag)
        self.result_prefix = self.keys.result_prefix.encode()
        self.codec = codec_for(settings.secret_key, settings.namespace, tag)
        self.is_ready = False  # replies of this deployment reach us
        self.is_preparing = False
        self.buffer: list[Any] = []
        self.buffered_bytes = 0
        self.in_the_air = 0
        self.bytes_in_the_air = 0
        self.unacknowledged: set[Batch] = set()
        self.was_alone = False  # the last request that was sent
        self._sealers: dict[bytes, Callable[[bytes, bytes], bytes]] = {}

    def sealer(self, method: bytes) -> Callable[[bytes, bytes], bytes]:
        """Of requests that call this method: ref and pickled arguments -> envelope. Any thread."""
        seal = self._sealers.get(method)
        if seal is None:
            seal = self._sealers[method] = self.codec.sealer("request", method)
        return seal


class Batch:
    """The flat requests of one submit call."""

    __slots__ = ("requests", "size_bytes")

    def __init__(self, requests: list[Any], size_bytes: int | None = None) -> None:
        self.requests = requests
        self.size_bytes = size_of(requests) if size_bytes is None else size_bytes

    @property
    def envelope_bytes(self) -> int:
        return self.size_bytes - len(self.requests) // FIELDS * OVERHEAD_BYTES


def size_of(requests: list[Any]) -> int:
    """What flat requests take in memory."""
    return sum(map(len, requests[FIELDS - 1 :: FIELDS])) + len(requests) // FIELDS * OVERHEAD_BYTES


def shorten_deadlines(requests: list[Any], pending: Mapping[bytes, Pending]) -> None:
    """In flat requests about to be sent: what they say of their time counts from when they were made."""
    now = time.monotonic()
    for i in range(0, len(requests), FIELDS):
        ref, extras = requests[i], requests[i + 3]
        if b'"timeout_ms"' in extras and ref in pending and now - pending[ref].since > LATE_S:
            requests[i + 3] = with_time_left(extras, now - pending[ref].since)


@dataclass(slots=True)
class Request:
    """A request that takes more than one step to send: it waits in the server, is large, or comes after others."""

    route: Route
    pending: Pending
    lane: bytes
    method: bytes
    extras: bytes
    envelope: bytes
    until_queued: bool = False
    depends_on: list[str] = field(default_factory=list)  # ref ids whose values it needs
    mentions: list[str] = field(default_factory=list)  # ref ids that must be on the server before it
    delay_ms: int = 0
    due_ms: int = 0  # on the server's clock
    arguments: Pickled | None = None  # where they are large
    payload: Sealing | None = None  # the envelope of those
    is_written: bool = False  # that payload, once at least
    is_shared: bool = False  # others may send the same request: it has an idempotency key
    acknowledged: asyncio.Future[None] | None = None  # or failed; made where somebody waits for it
    is_acknowledged: bool = False
    is_in_the_air: bool = False
    was_submitted: bool = False  # the server may have it
    is_withdrawn: bool = False  # it is not to be sent any more

    @property
    def size_bytes(self) -> int:
        return len(self.envelope) if self.arguments is None else self.arguments.size_bytes

    @property
    def must_wait(self) -> bool:
        """Is it to be parked or delayed by the server?"""
        return bool(self.depends_on or self.delay_ms or self.due_ms)

    def acknowledgement(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """Done when the server has the request, or never will."""
        if self.acknowledged is None:
            self.acknowledged = loop.create_future()
            if self.is_acknowledged:
                self.acknowledged.set_result(None)
        return self.acknowledged

    def anew(self, pending: Pending) -> Self:
        """The same request, to be sent once more; for whoever waits for it now."""
        return replace(
            self, pending=pending, acknowledged=None, is_acknowledged=False, is_in_the_air=False, was_submitted=False
        )

    def acknowledge(self) -> None:
        self.is_acknowledged = True
        if self.acknowledged is not None and not self.acknowledged.done():
            self.acknowledged.set_result(None)
