"""`ObjectRef`: the future of one request's result, addressed by its id from any process."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Generator
from typing import Any, Generic, Self

from millstream.broker.keys import split_ref
from millstream.broker.states import State
from millstream.errors import GetTimeoutError
from millstream.handles import engines
from millstream.handles.cell import Cell
from millstream.handles.engine import Engine
from millstream.handles.generics import T_co


class ObjectRef(Generic[T_co]):
    """The future of one request's result.

    `await ref` (repeatedly, in any loop), `ref.result(timeout)` (from any thread), `asyncio.wait([ref])`,
    `asyncio.gather(ref)`. Equal and hashable by id; pickles as its id. Waiting that times out or is cancelled never
    cancels the request, and neither does dropping the ref. A result whose ref was shared with nobody (its id was not
    read, it was not pickled nor passed on) is freed when the last reference to it is gone; any other after its TTL.
    """

    __slots__ = ("__weakref__", "_cell", "_engine", "_id", "_is_shared", "_lock")

    def __init__(self, ref_id: str, cell: Cell | None = None, engine: Engine | None = None) -> None:
        self._id, self._cell, self._engine = ref_id, cell, engine
        self._is_shared = cell is None  # else this process made it, and nobody else knows of it yet
        self._lock = threading.Lock()

    def __del__(self) -> None:
        cell, engine = self._cell, self._engine
        if not self._is_shared and cell is not None and engine is not None and not engine.is_closed:
            engine.drops.abandon(cell)  # no lock may be taken here: the collector may run us while this thread holds it

    @classmethod
    def from_id(cls, ref_id: str) -> Self:
        """The ref of that id, in any process that reaches the same server. ValueError if it is no ref id."""
        split_ref(ref_id)
        return cls(ref_id)

    @property
    def id(self) -> str:
        """`<app>.<deployment>~` and 22 characters. Whoever has it can read the result, until its TTL."""
        self._is_shared = True
        return self._id

    def share(self) -> None:
        """Keep the result until its TTL, whatever becomes of this ref: others may know its id."""
        self._is_shared = True

    def hex(self) -> str:
        """The id; Ray's name for it."""
        return self.id

    def __repr__(self) -> str:
        return f"ObjectRef({self.id})"

    def __hash__(self) -> int:
        return hash(self._id)

    def __eq__(self, other: object) -> bool:
        return self._id == other._id if isinstance(other, ObjectRef) else NotImplemented

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectRef, (self.id,)

    # asynchronous

    def __await__(self) -> Generator[Any, None, T_co]:
        cell = self._followed_here()
        if not cell.has_ended:
            yield from cell.future(asyncio.get_running_loop()).__await__()
        return cell.read()  # type: ignore[no-any-return]

    def add_done_callback(self, callback: Callable[[Self], object], *, context: Any = None) -> None:
        """Call `callback(ref)` in the running loop once the request has ended; what `asyncio.wait` needs."""
        loop = asyncio.get_running_loop()
        future = self._followed_here().future(loop)
        future.add_done_callback(lambda _: callback(self), context=context)

    def remove_done_callback(self, callback: Callable[[Self], object]) -> int:
        """Accepted for `asyncio.wait`, which calls it on what is not done; a late callback finds nobody."""
        return 0

    def cancelled(self) -> bool:
        return False

    def exception(self) -> BaseException | None:
        """The error of an ended request, None if it succeeded. asyncio.InvalidStateError before the end."""
        cell = self._followed()
        if not cell.has_ended:
            raise asyncio.InvalidStateError(f"{self!r} has not ended")
        return cell.error()

    def future(self) -> concurrent.futures.Future[T_co]:
        """A `concurrent.futures.Future` of the value."""
        future: concurrent.futures.Future[T_co] = concurrent.futures.Future()

        def ended(cell: Cell) -> None:
            error = cell.error()
            if error is None:
                future.set_result(cell.read())
            else:
                future.set_exception(error)

        future.set_running_or_notify_cancel()
        self._followed().on_end(ended)
        return future

    # ending and looking

    def cancel(self) -> bool:
        """Cancel the request, wherever it is, with the requests that it has sent; False if it had ended before.

        Whoever waits for it gets RequestCancelledError. Running code is cancelled if it is a coroutine, else only told
        (`serve.get_request_context().is_cancelled`), and its result is ignored; with options(kill_on_cancel=True) its
        replica is replaced. Blocks for one round trip; `await ref.acancel()` does not. BrokerUnavailableError.
        """
        engines.warn_if_on_a_loop("ref.cancel()", "`await ref.acancel()`")
        self._flushed_elsewhere()
        return engines.background().run(engines.background().engine.chores.cancel(self._id))

    async def acancel(self) -> bool:
        """As `cancel`, without blocking the loop."""
        engine = engines.current()
        if self._engine is not None and self._engine is not engine and not self._engine.is_closed:
            self._engine.resubmit_elsewhere(engine)
        return await engine.chores.cancel(self._id)

    def status(self) -> State:
        """Where the request is: parked, delayed, queued, running, succeeded, failed, dead, cancelled or timed_out.

        Asks the server. Raises RefNotFoundError, BrokerUnavailableError.
        """
        engines.warn_if_on_a_loop("ref.status()", "`await ref.astatus()`")
        self._flushed_elsewhere()
        return engines.background().run(engines.background().engine.chores.state(self._id))

    async def astatus(self) -> State:
        """As `status`, without blocking the loop."""
        return await engines.current().chores.state(self._id)

    def _flushed_elsewhere(self) -> None:
        """What a blocked loop of ours has not sent yet is sent by the background's engine, ahead of what follows."""
        background = engines.background().engine
        if self._engine is not None and self._engine is not background and not self._engine.is_closed:
            self._engine.resubmit_elsewhere(background)

    # synchronous

    def done(self) -> bool:
        """Has the request ended, as far as this process has heard?"""
        return self._followed().has_ended

    def result(self, timeout: float | None = None) -> T_co:
        """Block for the value, at most `timeout` seconds. Raises the request's error, GetTimeoutError, RefNotFoundError."""
        cell = self._followed_off_loop()
        if not cell.has_ended:
            engines.warn_if_on_a_loop("ref.result()", "`await ref`")
        if not cell.wait(timeout):
            raise GetTimeoutError(
                f"request {self.id} has no result after {timeout} s; it goes on: ask again, or look at `millstream ref {self.id}`",
                ref_id=self.id,
            )
        return cell.read()  # type: ignore[no-any-return]

    # who listens for us

    def _if_never_sent(self, call: Callable[[BaseException], None]) -> None:
        """Have `call(error)` called, in any thread, if this process learns that the request never reached the server."""

        def ended(cell: Cell) -> None:
            if (error := cell.unsent_error) is not None:
                call(error)

        if self._cell is not None:
            self._cell.on_end(ended)

    def _followed(self) -> Cell:
        """The cell, filled by some engine of this process."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._followed_off_loop()
        return self._followed_here()

    def _followed_here(self) -> Cell:
        """As `_followed`; if no engine listens (any more), that of the running loop does."""
        with self._lock:
            if self._cell is None or not self._is_served():
                cell = self._move_to(engine := engines.current())
                engine.chores.follow(engine.route(cell.codec.tag), cell)
                return cell
            return self._cell

    def _followed_off_loop(self) -> Cell:
        """As `_followed`, by an engine that goes on while this thread blocks."""
        with self._lock:
            engine, cell = self._engine, self._cell
            is_served = cell is not None and engine is not None and self._is_served()
            if is_served and (cell.has_ended or engine.loop is not engines.running_loop()):  # type: ignore[union-attr]
                return cell  # type: ignore[return-value]
            background = engines.background()
            cell = self._move_to(background.engine)
            background.call(background.engine.chores.follow, background.engine.route(cell.codec.tag), cell)
            return cell

    def _is_served(self) -> bool:
        """Has the cell been filled, or will it be? Not by an engine that was closed, or whose loop stands still."""
        cell, engine = self._cell, self._engine
        assert cell is not None and engine is not None
        if cell.has_ended:
            return not (engine.is_closed and cell.was_cut_off)
        return not engine.is_closed and engine.loop.is_running()

    def _move_to(self, engine: Engine) -> Cell:
        """A new cell, to be filled by this engine. It also sends what the former one, now blocked, may not have sent."""
        if self._engine is not None and not self._engine.is_closed:
            self._engine.resubmit_elsewhere(engine)
        self._is_shared = True  # by two engines: which of them may free it?
        self._engine, self._cell = engine, self._new_cell(engine)
        return self._cell

    def _new_cell(self, engine: Engine) -> Cell:
        tag, local = split_ref(self._id)
        return Cell(engine.route(tag).codec, local.encode())
