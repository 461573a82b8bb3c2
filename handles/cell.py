"""What this process knows of one request: whether a replica has it, and how it ended. Readable from any thread or loop."""

import asyncio
import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from millstream.broker import outcomes
from millstream.broker.codec import Codec, Verified
from millstream.errors import BrokerUnavailableError, MillstreamError, RequestCancelledError

Watcher = Callable[["Cell"], None]

_lock = threading.Lock()  # one for all cells: held for a few list operations, 60 ns when nobody else wants it


def _forget_lock() -> None:
    """In a forked child: a thread of the parent may have held it."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)


class Cell:
    """Filled by the engine, at most once with an outcome. Watchers are called in the filling thread, or at once."""

    __slots__ = (
        "_error", "_large", "_on_end", "_on_match", "_stored", "_value", "codec", "is_matched", "is_private", "ref", "since",
    )  # fmt: skip

    def __init__(self, codec: Codec, ref: bytes, *, is_private: bool = False, since: float | None = None) -> None:
        self.codec, self.ref, self.is_private = codec, ref, is_private
        self.since = time.monotonic() if since is None else since
        self.is_matched = False
        self._stored: bytes | None = None
        self._large: Verified | None = None  # the value, where it lies in a key of its own
        self._error: BaseException | None = None
        self._value: Any = _UNREAD
        self._on_match: tuple[Watcher, ...] = ()
        self._on_end: tuple[Watcher, ...] = ()

    @property
    def ref_id(self) -> str:
        return f"{self.codec.tag}~{self.ref.decode()}"

    @property
    def has_ended(self) -> bool:
        return self._stored is not None or self._error is not None

    @property
    def is_over(self) -> bool:
        return self.has_ended

    @property
    def was_cut_off(self) -> bool:
        """Did the connection end before the request did? Its result may still be there for another engine."""
        return isinstance(self._error, BrokerUnavailableError)

    @property
    def unsent_error(self) -> BaseException | None:
        """Why there will never be an outcome on the server, if that is so: refused, or its deployment cannot start."""
        return None if self.was_cut_off else self._error

    @property
    def was_cancelled(self) -> bool:
        """On the server, or here before it was sent. A dependant of what was cancelled has failed."""
        return isinstance(self._error, RequestCancelledError) or (self._stored or b"").startswith(b"cancelled")

    def settle(self, stored: bytes, large: Verified | None = None) -> None:
        """The request has ended; `stored` is what its result key holds, `large` what its value key does."""
        self._large = large
        self._end(stored, None)

    def fail(self, error: BaseException) -> None:
        """There will be no outcome for this process: never sent, unknown to the server, or cannot start."""
        self._end(None, error)

    def match(self) -> None:
        """A replica took it, or it is parked or delayed."""
        with _lock:
            if self.is_matched:
                return
            self.is_matched = True
            watchers, self._on_match = self._on_match, ()
        for watcher in watchers:
            watcher(self)

    def item(self, stored: bytes) -> None:
        """Of a stream: whoever reads it has a cell of another kind."""

    def look_again(self) -> bool:
        """It is still open. Does anybody wait for its match, whose notice may have been lost?"""
        return bool(self._on_match)

    def _end(self, stored: bytes | None, error: BaseException | None) -> None:
        with _lock:
            if self.has_ended:
                return
            self._stored, self._error, self.is_matched = stored, error, True
            watchers, self._on_match, self._on_end = self._on_match + self._on_end, (), ()
        for watcher in watchers:
            watcher(self)

    def on_end(self, watcher: Watcher) -> None:
        self._add(watcher, ended=True)

    def on_match(self, watcher: Watcher) -> None:
        self._add(watcher, ended=False)

    def _add(self, watcher: Watcher, *, ended: bool) -> None:
        with _lock:
            if ended and not self.has_ended:
                self._on_end += (watcher,)
                return
            if not ended and not self.is_matched:
                self._on_match += (watcher,)
                return
        watcher(self)

    def forget(self, watcher: Watcher) -> None:
        """Take a watcher back, if it was not called yet."""
        with _lock:
            self._on_match = _without(watcher, self._on_match)
            self._on_end = _without(watcher, self._on_end)

    def read(self) -> Any:
        """The value, or the error raised. Only after the end. Every read gives the same value, and a new error."""
        stored, large = self._stored, self._large  # before `_value`: another thread that sets that cuts these
        if self._value is not _UNREAD:
            return self._value
        if self._error is not None:
            raise outcomes.same_kind(self._error)
        assert stored is not None
        try:
            value = outcomes.open_stored(self.codec, self.ref, stored, large)
        except MillstreamError as e:
            raise e.with_traceback(None)  # noqa: B904 - it is the same one, without how we rebuilt it
        if self._value is _UNREAD:
            self._value = value
        if outcomes.large_part(stored) is None:
            self._stored = stored[: stored.index(b"\n") + 1]  # the value is enough
        self._large = None
        return self._value

    def error(self) -> BaseException | None:
        """What `read` would raise, None if it would not."""
        try:
            self.read()
        except Exception as e:
            return e
        return None

    def raise_if_lost(self) -> None:
        """After the match: what never reached the server, or no replica in time, raises here; all else at its ref."""
        if self.has_ended and (self._stored or b"timed_out").startswith(b"timed_out"):
            with contextlib.suppress(RequestCancelledError):  # before it was sent; as where the server was told
                self.read()

    @property
    def stored(self) -> bytes | None:
        return self._stored

    # waiting

    def wait(self, timeout: float | None, *, for_end: bool = True) -> bool:
        """Block the thread until the end (or the match); False when `timeout` seconds were not enough."""
        if self.has_ended if for_end else self.is_matched:
            return True
        turnstile = threading.Lock()
        turnstile.acquire()

        def watcher(_: Cell) -> None:
            turnstile.release()

        self._add(watcher, ended=for_end)
        try:
            return turnstile.acquire(timeout=-1 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX))
        finally:
            self.forget(watcher)

    def future(self, loop: asyncio.AbstractEventLoop, *, for_end: bool = True) -> asyncio.Future[None]:
        """A future of `loop` that is done at the end (or the match). It never raises; `read` does."""
        future: asyncio.Future[None] = loop.create_future()

        def watcher(_: Cell) -> None:
            if threading.get_ident() == owner:
                _done(future)
            else:
                _call_in(loop, functools.partial(_done, future))

        owner = threading.get_ident()
        self._add(watcher, ended=for_end)
        future.add_done_callback(lambda _: self.forget(watcher))
        return future


def _without(watcher: Watcher, watchers: tuple[Watcher, ...]) -> tuple[Watcher, ...]:
    """Without one that is in it at most once."""
    return tuple(one for one in watchers if one != watcher) if watcher in watchers else watchers


_UNREAD: Any = object()


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _call_in(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the waiting loop was closed meanwhile: nobody waits there any more
        loop.call_soon_threadsafe(call)
