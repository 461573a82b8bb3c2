"""The request that code is running for: set by the replica, read by handles (and by `serve.get_multiplexed_model_id`)."""

import contextlib
import os
import threading
from contextvars import ContextVar
from typing import Any

from millstream.handles.route import Pending

PRUNE_AT = 64  # children; those that have ended are forgotten whenever their number has doubled
_lock = threading.Lock()  # for what happens rarely, and in any thread


def _forget_lock() -> None:
    """In a forked child: a thread of the parent may have held it."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)


class Request:
    """What the code of a request may know of it: `serve.get_request_context()`. One per attempt."""

    __slots__ = ("_cancelled", "_children", "_prune_at", "_ref", "_tag", "is_cancelled", "model_id")

    def __init__(self, tag: str, ref: bytes, model_id: str = "") -> None:
        self._tag, self._ref = tag, ref
        self.model_id = model_id  # of options(multiplexed_model_id=); "" without one
        self.is_cancelled = False  # or timed out: nobody wants its result any more
        self._cancelled: threading.Event | None = None
        self._children: list[tuple[Any, Pending]] | None = None  # requests that it has sent, with their engines

    @property
    def ref_id(self) -> str:
        """The id of its ref, for logs or for `ObjectRef.from_id`; "" in a batch, which runs for several."""
        return f"{self._tag}~{self._ref.decode()}" if self._ref else ""

    def wait_cancelled(self, timeout_s: float | None = None) -> bool:
        """Block a sync method's thread until the request is cancelled, at most `timeout_s`; whether it is."""
        with _lock:
            if self._cancelled is None:
                self._cancelled = threading.Event()
                if self.is_cancelled:
                    self._cancelled.set()
        return self._cancelled.wait(timeout_s)

    def sends(self, engine: Any, pending: Pending) -> None:
        """Note a request that this one has sent: it is cancelled with it. Any thread."""
        if self._children is None:
            with _lock:
                if self._children is None:
                    self._prune_at = PRUNE_AT
                    self._children = []
        children = self._children
        children.append((engine, pending))
        if len(children) > self._prune_at:
            with _lock:
                count = len(children)  # others may add more meanwhile, and they stay
                children[:count] = [child for child in children[:count] if _is_open(*child)]
                self._prune_at = max(PRUNE_AT, 2 * len(children))

    def cancel(self) -> None:
        """Tell the code, and cancel what it has sent and what has not ended. What it sends from now on is its own affair."""
        with _lock:
            self.is_cancelled = True
            if self._cancelled is not None:
                self._cancelled.set()
        by_engine: dict[Any, list[str]] = {}
        for engine, pending in list(self._children or ()):
            if _is_open(engine, pending):
                by_engine.setdefault(engine, []).append(f"{pending.codec.tag}~{pending.ref.decode()}")
        for engine, ref_ids in by_engine.items():
            with contextlib.suppress(RuntimeError):  # its loop was closed just now
                engine.loop.call_soon_threadsafe(engine.endings.cancel_soon, ref_ids)


def _is_open(engine: Any, pending: Pending) -> bool:
    """Who waited for it may have gone away without it."""
    return not engine.is_closed and (not pending.is_over or pending.ref in engine.pending)


current: ContextVar[Request | None] = ContextVar("millstream_request", default=None)
