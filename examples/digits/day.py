"""What the demo sees in its day: answers, and looks at the application. No I/O, no drawing."""

import time
from dataclasses import dataclass, field

import numpy as np

from millstream.serve import ApplicationStatus


@dataclass(frozen=True, slots=True)
class Look:
    """The application at one moment."""

    at_s: float
    status: ApplicationStatus

    @property
    def replicas(self) -> dict[str, int]:
        """How many processes each deployment has, on their way up and down included."""
        return {name: len(one.replicas) for name, one in self.status.deployments.items()}

    @property
    def waiting(self) -> int:
        return sum(one.waiting for one in self.status.deployments.values())

    @property
    def is_at_zero(self) -> bool:
        return not any(self.replicas.values())


@dataclass
class Day:
    """Everything on record, from the first request to the last replica's end."""

    requests: int
    seconds: float  # over which they are sent
    started_s: float = field(default_factory=time.perf_counter)
    latencies_s: list[float] = field(default_factory=list)
    correct: int = 0
    answered_at_s: float = 0.0  # when the latest answer came
    looks: list[Look] = field(default_factory=list)

    def now_s(self) -> float:
        return time.perf_counter() - self.started_s

    def answer(self, latency_s: float, *, is_correct: bool) -> None:
        self.latencies_s.append(latency_s)
        self.correct += is_correct
        self.answered_at_s = self.now_s()

    def look(self, status: ApplicationStatus) -> None:
        self.looks.append(Look(self.now_s(), status))

    @property
    def answered(self) -> int:
        return len(self.latencies_s)

    @property
    def is_over(self) -> bool:
        """Is everything answered and every replica gone again?"""
        return self.answered == self.requests and bool(self.looks) and self.looks[-1].is_at_zero

    @property
    def accuracy(self) -> float:
        return self.correct / max(1, self.answered)

    @property
    def requests_per_s(self) -> float:
        return self.answered / max(1e-9, self.answered_at_s)

    @property
    def most_replicas(self) -> int:
        return max((sum(look.replicas.values()) for look in self.looks), default=0)

    @property
    def most_waiting(self) -> int:
        return max((look.waiting for look in self.looks), default=0)

    def percentile_s(self, percent: float) -> float:
        return float(np.percentile(self.latencies_s, percent))


def arrivals_s(count: int, length_s: float) -> np.ndarray:
    """When each of `count` requests is sent: quiet in the morning, busy at noon, quiet in the evening (a sine squared)."""
    clock = np.linspace(0, 1, 1000)
    sent_by_then = clock - np.sin(2 * np.pi * clock) / (2 * np.pi)
    return length_s * np.interp((np.arange(count) + 0.5) / count, sent_by_then, clock)
