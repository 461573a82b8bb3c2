"""What a launcher remembers of its starts: those under way, those that failed, and when the next one may be. No I/O."""

import time
from collections.abc import Callable
from typing import NamedTuple

START_FAILURES = 3  # in a row, of one version and config: then it cannot start
QUICK_DEATH_S = 5.0  # a replica that lives no longer is started again with a growing delay
LONGEST_DELAY_S = 10.0


class Release(NamedTuple):
    """What is tried to start. With another config the same code may do better."""

    tag: str
    version: str
    revision: str


class Starts:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.under_way: dict[tuple[str, str], int] = {}  # (tag, version) -> how many
        self._failures: dict[Release, int] = {}
        self._given_up: set[Release] = set()
        self._quick_deaths: dict[str, int] = {}
        self._not_before: dict[str, float] = {}  # tag -> when the next start may be

    def may_begin(self, release: Release) -> bool:
        return release not in self._given_up and self._not_before.get(release.tag, 0.0) <= self._clock()

    def begin(self, tag: str, version: str) -> None:
        self.under_way[tag, version] = self.under_way.get((tag, version), 0) + 1

    def end(self, tag: str, version: str) -> None:
        self.under_way[tag, version] -= 1
        if not self.under_way[tag, version]:
            del self.under_way[tag, version]

    def succeeded(self, release: Release) -> None:
        self._failures.pop(release, None)

    def failed(self, release: Release) -> bool:
        """One ended before it was ready. True if that was the last try."""
        self._failures[release] = self._failures.get(release, 0) + 1
        return self._failures[release] >= START_FAILURES

    def give_up(self, release: Release) -> None:
        self._given_up.add(release)

    def has_given_up(self, version: str) -> bool:
        return any(release.version == version for release in self._given_up)

    def lived(self, tag: str, lifetime_s: float) -> None:
        """Slow down the next start after quick deaths."""
        if lifetime_s >= QUICK_DEATH_S:
            self._quick_deaths.pop(tag, None)
            return
        quick = self._quick_deaths[tag] = self._quick_deaths.get(tag, 0) + 1
        self._not_before[tag] = self._clock() + min(LONGEST_DELAY_S, 0.05 * 2**quick)
