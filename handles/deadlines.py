"""The deadlines of this process's own requests: one timer for all, so that a caller hears in time that its time is up.

The server's clock decides; this only asks it. Sweepers find the deadlines of callers that are gone.
"""

import asyncio
import heapq
from collections.abc import Callable, Container

SLACK = 1000  # ended requests may stay in the heap, up to about as many as are pending, and these


class Deadlines:
    """Calls `expire(tag, refs)` when the time of requests that are still pending has come."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, pending: Container[bytes], expire: Callable[[str, list[bytes]], None]
    ) -> None:
        self._loop, self._pending, self._expire = loop, pending, expire
        self._heap: list[tuple[float, bytes, str]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._clean_at = SLACK

    def __bool__(self) -> bool:
        """Is there any?"""
        return bool(self._heap)

    def add(self, tag: str, ref: bytes, in_s: float) -> None:
        when = self._loop.time() + in_s
        heapq.heappush(self._heap, (when, ref, tag))
        if len(self._heap) > self._clean_at:
            self._forget_the_ended()
        if self._timer is None or when < self._timer.when():
            self._start_timer()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _start_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._heap[0][0], self._look) if self._heap else None

    def _look(self) -> None:
        now = self._loop.time()
        due: dict[str, dict[bytes, None]] = {}
        while self._heap and self._heap[0][0] <= now:
            _, ref, tag = heapq.heappop(self._heap)
            if ref in self._pending:
                due.setdefault(tag, {})[ref] = None  # once: two callers with one idempotency key may wait for it
        for tag, refs in due.items():
            self._expire(tag, list(refs))
        self._timer = None
        self._start_timer()

    def _forget_the_ended(self) -> None:
        self._heap = [row for row in self._heap if row[1] in self._pending]
        heapq.heapify(self._heap)
        self._clean_at = 2 * len(self._heap) + SLACK
