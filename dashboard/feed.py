"""The one poller behind every page and API call: it reads when somebody asks, and not more often than POLL_S."""

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

import anyio

from millstream.broker.connection import DOWN
from millstream.config import Settings, redact
from millstream.dashboard.rates import Rates, RateWindow
from millstream.dashboard.reading import Look
from millstream.dashboard.snapshot import Snapshot, shape
from millstream.errors import SignatureError

POLL_S = 1.0
READ_TIMEOUT_S = 3.0  # a server that is frozen must not freeze the page: it is told so instead
log = logging.getLogger("millstream.dashboard")


@dataclass(frozen=True, slots=True)
class Latest:
    """The newest snapshot there is. `error` says why there is no newer one; "" when the last look succeeded."""

    snapshot: Snapshot | None
    age_s: float | None
    error: str

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


class Feed:
    """Ask `latest()` at any rate, from any number of clients. Between two looks it keeps counters, for the rates."""

    def __init__(
        self,
        settings: Settings,
        look: Callable[[], Awaitable[Look]],
        *,
        poll_s: float = POLL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._look, self._clock = settings, look, clock
        self.poll_s = poll_s
        self._lock = anyio.Lock()
        self._windows: dict[str, RateWindow] = {}
        self._snapshot: Snapshot | None = None
        self._taken_at_s = self._tried_at_s = float("-inf")
        self._error = ""
        self.closed = anyio.Event()

    def close(self) -> None:
        """Let those who wait for the next look go: the dashboard ends."""
        self.closed.set()

    async def latest(self) -> Latest:
        """What is in Redis now, at most `poll_s` old; with the last that was known and the reason when it can't be read."""
        async with self._lock:
            # A client that comes once every poll_s must find a new look each time, also when it is a little early.
            if self._clock() - self._tried_at_s > 0.9 * self.poll_s:
                await self._try()
            age_s = round(self._clock() - self._taken_at_s, 3) if self._snapshot else None
            return Latest(self._snapshot, age_s, self._error)

    async def _try(self) -> None:
        error = await self._read()
        self._tried_at_s = self._clock()
        if error and error != self._error:
            log.warning("%s; showing what was known before", error)
        if self._error and not error:
            log.info("the server answers again")
        self._error = error

    async def _read(self) -> str:
        """Take one look in. Returns what went wrong, "" if nothing did."""
        try:
            with anyio.fail_after(READ_TIMEOUT_S):
                look = await self._look()
            self._snapshot = shape(look, self._rates(look), self._settings)
        except TimeoutError:
            return f"the server at {redact(self._settings.url)} did not answer within {READ_TIMEOUT_S:g} s"
        except (*DOWN, SignatureError) as e:
            return str(e)
        except Exception as e:  # a record we cannot read, a command an ACL forbids: the page must say so and go on
            if not self._error:
                log.exception("what is in Redis cannot be shown")
            return f"what is in Redis cannot be shown: {type(e).__name__}: {e}"
        self._taken_at_s = self._clock()
        return ""

    def _rates(self, look: Look) -> dict[str, Rates]:
        tags = {view.tag for view in look.views}
        self._windows = {tag: self._windows.get(tag, RateWindow()) for tag in tags}
        return {view.tag: self._windows[view.tag].add(look.at_ms, view.backlog) for view in look.views}
