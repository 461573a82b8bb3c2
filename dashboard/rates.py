"""Rates of one deployment: differences of its exact counters between the looks of the last seconds. Pure."""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from millstream.broker.control_scripts import Backlog

WINDOW_MS = 10_000  # long enough for a steady figure, short enough to see a burst


class Rates(NamedTuple):
    """None until two looks have been taken."""

    arrivals_per_s: float | None = None
    completions_per_s: float | None = None


class _Counters(NamedTuple):
    at_ms: int
    arrivals: int
    ended: int  # arrivals less what is still there: finished, cancelled, dead


@dataclass
class RateWindow:
    """The counters of the last WINDOW_MS."""

    _seen: deque[_Counters] = field(default_factory=deque)

    def add(self, at_ms: int, backlog: Backlog) -> Rates:
        """Take one reading in, and say what follows. A counter or clock that went backwards starts the window over."""
        now = _Counters(at_ms, backlog.arrivals, backlog.arrivals - backlog.waiting - backlog.in_flight)
        if self._seen and (now.arrivals < self._seen[-1].arrivals or now.at_ms <= self._seen[-1].at_ms):
            self._seen.clear()
        self._seen.append(now)
        while self._seen[0].at_ms < at_ms - WINDOW_MS:
            self._seen.popleft()
        return self._rates()

    def _rates(self) -> Rates:
        first, last = self._seen[0], self._seen[-1]
        if first is last:
            return Rates()
        elapsed_s = (last.at_ms - first.at_ms) / 1000
        # `ended` may step back by one or two: the counters of four lanes move while a script of a replica is between them.
        return Rates((last.arrivals - first.arrivals) / elapsed_s, max(0, last.ended - first.ended) / elapsed_s)
