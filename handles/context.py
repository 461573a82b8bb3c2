"""The request that code is running for: set by the replica, read by handles (and by `serve.get_multiplexed_model_id`)."""

import threading
from contextvars import ContextVar
from typing import Any

from millstream.handles.route import Pending

PRUNE_AT = 64  # children; those that have ended are forgotten whenever their number has doubled


class Request:
    """What the code of a request may know of it. One per attempt."""

    __slots__ = ("_cancelled", "_children", "_prune_at", "_ref_id", "is_cancelled", "model_id")

    def __init__(self, ref_id: str, model_id: str) -> None:
        self._ref_id = ref_id
        self.model_id = model_id  # of options(multiplexed_model_id=); "" without one
        self.is_cancelled = False  # or timed out: nobody wants its result any more
        self._cancelled: threading.Event | None = None
        self._children: list[tuple[Any, Pending]] = []  # requests that it has sent, with their engines
        self._prune_at = PRUNE_AT

    @property
    def ref_id(self) -> str:
        return self._ref_id

    def wait_cancelled(self, timeout_s: float | None = None) -> bool:
        """Block a sync method's thread until the request is cancelled, at most `timeout_s`; whether it is."""
        if self._cancelled is None:
            self._cancelled = threading.Event()
            if self.is_cancelled:
                self._cancelled.set()
        return self._cancelled.wait(timeout_s)

    def sends(self, engine: Any, pending: Pending) -> None:
        """Note a request that this one has sent: it is cancelled with it."""
        children = self._children
        children.append((engine, pending))
        if len(children) > self._prune_at:
            self._children = [child for child in children if not child[1].is_over]
            self._prune_at = max(PRUNE_AT, 2 * len(self._children))

    def cancel(self) -> None:
        """Tell the code, and cancel what it has sent and what has not ended."""
        self.is_cancelled = True
        if self._cancelled is not None:
            self._cancelled.set()
        for engine, pending in self._children:
            if not pending.is_over and not engine.is_closed:
                ref_id = f"{pending.codec.tag}~{pending.ref.decode()}"
                engine.loop.call_soon_threadsafe(engine.chores.cancel_soon, ref_id)


current: ContextVar[Request | None] = ContextVar("millstream_request", default=None)
