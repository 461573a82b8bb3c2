"""A short history of one deployment's backlog, and the rates that follow from it. Pure."""

from collections import deque
from dataclasses import dataclass, field

from millstream.broker.control_scripts import Backlog

FAST_S = 10.0  # rates over this window answer quickly
SLOW_S = 60.0  # and over this one do not forget a burst at once


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at one deployment. `at_s` is any clock that only goes forward."""

    at_s: float
    backlog: Backlog
    running: int
    starting: int

    @property
    def waiting(self) -> int:
        """What wants a replica now: queued, and delayed ones that are due."""
        return self.backlog.waiting + self.backlog.due

    @property
    def in_flight(self) -> int:
        return self.backlog.in_flight

    @property
    def ended(self) -> int:
        """Requests that have left the queue for good, up to a constant: arrivals less what is still there."""
        return self.backlog.arrivals - self.backlog.waiting - self.backlog.in_flight


@dataclass(frozen=True, slots=True)
class Rates:
    """What the policy goes by besides the latest reading."""

    arrivals_per_s: float  # the larger of the fast and the slow window
    completions_per_s: float
    mean_in_flight: float
    service_time_s: float | None  # Little's law, S = L / X: mean in flight over completions per second


@dataclass
class History:
    """The readings of the last SLOW_S seconds."""

    readings: deque[Reading] = field(default_factory=deque)

    def add(self, reading: Reading) -> None:
        """A counter that went backwards means another deployment of the same name, or a new server: start over."""
        if self.readings and reading.backlog.arrivals < self.readings[-1].backlog.arrivals:
            self.readings.clear()
        self.readings.append(reading)
        while self.readings[0].at_s < reading.at_s - SLOW_S:
            self.readings.popleft()

    def rates(self) -> Rates:
        fast, slow = self._window(FAST_S), self._window(SLOW_S)
        arrivals = max(_rate(fast, "arrivals"), _rate(slow, "arrivals"))
        completions = _rate(fast, "ended")
        in_flight = _mean_in_flight(fast)
        service = in_flight / completions if completions > 0 and in_flight > 0 else None
        return Rates(arrivals, completions, in_flight, service)

    def _window(self, length_s: float) -> list[Reading]:
        since = self.readings[-1].at_s - length_s
        return [r for r in self.readings if r.at_s >= since]


def _rate(window: list[Reading], counter: str) -> float:
    if len(window) < 2:
        return 0.0
    first, last = window[0], window[-1]
    grown = last.ended - first.ended if counter == "ended" else last.backlog.arrivals - first.backlog.arrivals
    return max(0.0, grown / (last.at_s - first.at_s)) if last.at_s > first.at_s else 0.0


def _mean_in_flight(window: list[Reading]) -> float:
    return sum(r.in_flight for r in window) / len(window)
