"""How calls become batches: one queue per batched function, instance and event loop, for as long as it holds calls.

No task waits for calls: a timer of the loop starts what does not get full in time, and each batch is a task.
"""

import asyncio
import logging
from typing import Any

from millstream.handles.context import Request, current
from millstream.replicas.batch_calls import Batching, Call, Limits, hand_out, hand_out_items
from millstream.replicas.belongings import kept_with
from millstream.replicas.context import find_replica_context

log = logging.getLogger("millstream.replica")

_Key = tuple[Batching, int, asyncio.AbstractEventLoop]
_queues: dict[_Key, "Queue"] = {}


def queue_of(batching: Batching, instance: Any) -> "Queue":
    """The queue of the running loop; a new one if the last one has run empty."""
    key = (batching, id(instance), asyncio.get_running_loop())  # while there is a queue, it holds the instance
    queue = _queues.get(key)
    if queue is None:
        for other in [other for other in list(_queues) if other[2].is_closed()]:
            _queues.pop(other, None)  # its loop was closed without cancelling what it ran
        queue = _queues[key] = Queue(key, instance)
    return queue


def limits_of(batching: Batching, instance: Any) -> Limits:
    """Those that were set for this instance, or else those of the decorator."""
    limits: Limits = kept_with(instance).get(batching.name, batching.limits)
    return limits


class Queue:
    """The calls that wait, by the model they are for, and the batches that run."""

    def __init__(self, key: _Key, instance: Any) -> None:
        self._key, self._instance = key, instance
        self._batching, _, self.loop = key
        self._lanes: dict[str, _Lane] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._warn_if_never_full()

    def put(self, call: Call) -> None:
        """Let a call wait for its batch, which starts at once if this makes it full. RuntimeError: it fits in none."""
        lane = self._lanes.get(call.model_id)
        if lane is None:
            lane = _Lane(self, self._batching)
        try:
            lane.add(call)
        except BaseException:
            self._end_if_idle()
            raise
        self._lanes[call.model_id] = lane
        self.start_what_is_ready()

    def drop(self, call: Call) -> None:
        """Its caller is gone: leave it out, if its batch has not started."""
        lane = self._lanes.get(call.model_id)
        if lane is not None and lane.remove(call):
            self._tidy(call.model_id, lane)
            self._end_if_idle()

    def limits(self) -> Limits:
        return limits_of(self._batching, self._instance)

    def start_what_is_ready(self) -> None:
        while len(self._running) < self._batching.max_concurrent_batches:
            ready = [(lane.oldest, model_id) for model_id, lane in self._lanes.items() if lane.is_ready]
            if not ready:
                return
            _, model_id = min(ready)
            self._start(model_id, self._lanes[model_id])

    def _start(self, model_id: str, lane: "_Lane") -> None:
        calls = lane.take()
        self._tidy(model_id, lane)
        task = self.loop.create_task(self._run(model_id, calls), context=calls[0].context)
        self._running.add(task)
        task.add_done_callback(self._ended)

    async def _run(self, model_id: str, calls: list[Any]) -> None:
        """One batch. What goes wrong goes to its callers."""
        current.set(Request("", b"", model_id))  # not that of its first caller: the others have as much part in it
        calls = [call for call in calls if not call.is_over]
        if not calls:
            return
        batching = self._batching
        try:
            produced = batching.call(self._instance, calls)
            await (hand_out_items if batching.is_generator else hand_out)(produced, calls, batching.name)
        except BaseException as error:  # a SystemExit would end the loop; in the callers it is theirs to handle
            if isinstance(error, Exception) and all(call.is_over for call in calls):
                log.warning("a batch of %s failed after its callers had gone", batching.name, exc_info=error)
            for call in calls:
                call.fail(error)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self.start_what_is_ready()
        self._end_if_idle()

    def _tidy(self, model_id: str, lane: "_Lane") -> None:
        if not lane.calls:
            lane.close()
            del self._lanes[model_id]

    def _end_if_idle(self) -> None:
        if not self._lanes and not self._running:
            _queues.pop(self._key, None)

    def _warn_if_never_full(self) -> None:
        batching, replica = self._batching, find_replica_context()
        if batching.has_warned or replica is None or batching.batch_size_fn is not None:
            return
        size = self.limits().max_batch_size
        if replica.max_ongoing_requests < size * batching.max_concurrent_batches:
            batching.has_warned = True
            log.warning(
                "batches of %s are never full: max_ongoing_requests=%d of %s.%s is below max_batch_size=%d * "
                "max_concurrent_batches=%d; raise the first or lower the others",
                batching.name,
                replica.max_ongoing_requests,
                replica.app_name,
                replica.deployment,
                size,
                batching.max_concurrent_batches,
            )


class _Lane:
    """The calls for one model that wait, the oldest first, and which of them are the next batch."""

    def __init__(self, queue: Queue, batching: Batching) -> None:
        self._queue, self._weigh_items = queue, batching.batch_size_fn
        self.calls: list[Call] = []
        self._limits = queue.limits()
        self._fitting = 0  # so many of them, from the oldest on, are known to go together
        self._weight = 0.0
        self._is_due = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def oldest(self) -> float:
        return self.calls[0].since

    @property
    def is_ready(self) -> bool:
        """Full, or waited long enough."""
        return self._is_due or self._fitting < len(self.calls) or self._weight >= self._limits.max_batch_size

    def add(self, call: Call) -> None:
        """RuntimeError for a call that is too large for a batch of its own; whatever `batch_size_fn` raises for it."""
        if self._weigh_items is not None and (weight := self._weigh_items([call.item])) > self._limits.max_batch_size:
            raise RuntimeError(
                f"an item of size {weight} is larger than max_batch_size={self._limits.max_batch_size}: raise that, or "
                "look at batch_size_fn"
            )
        self.calls.append(call)
        if len(self.calls) == 1:
            self._begin()
        self._see_what_fits()

    def remove(self, call: Call) -> bool:
        """Take a call out; False if it has gone into a batch before."""
        if call not in self.calls:
            return False
        self.calls.remove(call)
        self._fitting = 0
        self._see_what_fits()
        return True

    def take(self) -> list[Call]:
        """The calls of the next batch. For what is left, the wait goes on with the limits of now."""
        taken, self.calls = self.calls[: self._fitting], self.calls[self._fitting :]
        if self.calls:
            self._limits = self._queue.limits()
            self._begin()
            self._fitting = 0
            self._see_what_fits()
        return taken

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _begin(self) -> None:
        """Start the clock of the next batch; it runs since the oldest call has come."""
        self.close()
        left_s = self.oldest + self._limits.batch_wait_timeout_s - self._queue.loop.time()
        # Never at once: calls that are made in the same pass of the loop should go together even with a wait of 0.
        self._is_due = False
        self._timer = self._queue.loop.call_later(max(0.0, left_s), self._on_due)

    def _on_due(self) -> None:
        self._is_due = True
        self._queue.start_what_is_ready()

    def _see_what_fits(self) -> None:
        while self._fitting < len(self.calls):
            weight = self._weigh(self._fitting + 1)
            if self._fitting > 0 and weight > self._limits.max_batch_size:
                return
            self._fitting, self._weight = self._fitting + 1, weight

    def _weigh(self, count: int) -> float:
        if self._weigh_items is None:
            return count
        try:
            return self._weigh_items([call.item for call in self.calls[:count]])
        except Exception:  # each alone had a size; together they have none, so they do not go together
            return float("inf")
