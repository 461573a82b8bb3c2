"""`ObjectRef`: the future of one request's result, addressed by its id from any process."""

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, Self, TypeVar

from millstream.broker.keys import split_ref
from millstream.broker.states import State
from millstream.errors import GetTimeoutError
from millstream.handles import engines
from millstream.handles.cell import Cell
from millstream.handles.engine import Engine
from millstream.handles.generics import T_co

T = TypeVar("T")

_lock = (
    threading.RLock()
)  # of which engine fills whose cell; one for all refs, so that a forked child can have a new one


def _forget_lock() -> None:
    """In a forked child: a thread of the parent may have held it."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_forget_lock)


class ObjectRef(Generic[T_co]):
    """The future of one request's result.

    `await ref` (repeatedly, in any loop), `ref.result(timeout)` (from any thread), `asyncio.wait([ref])`,
    `asyncio.gather(ref)`. Equal and hashable by id; pickles as its id. Waiting that times out or is cancelled never
    cancels the request, and neither does dropping the ref. A result whose ref was shared with nobody (its id was not
    read, it was not pickled nor passed on) is freed when the last reference to it is gone; any other after its TTL.
    """

    __slots__ = ("__weakref__", "_cell", "_engine", "_id", "_is_shared")

    def __init__(self, ref_id: str, cell: Cell | None = None, engine: Engine | None = None) -> None:
        self._id, self._cell, self._engine = ref_id, cell, engine
        self._is_shared = cell is None  # else this process made it, and nobody else knows of it yet

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

    @property
    def request_id(self) -> str:
        """The id; the name it has on Ray's `DeploymentResponse`."""
        return self.id

    async def _to_object_ref(self) -> "ObjectRef":
        return self  # Ray's way from a response to the ref of its value: here they are one

    def _to_object_ref_sync(self) -> "ObjectRef":
        return self

    def __repr__(self) -> str:
        return f"ObjectRef({self.id})"

    def __hash__(self) -> int:
        return hash(self._id)

    def __eq__(self, other: object) -> bool:
        return self._id == other._id if isinstance(other, ObjectRef) else NotImplemented

    def __reduce__(self) -> tuple[Any, ...]:
        settings = engines.settings_for_child()
        return (ObjectRef, (self.id,)) if settings is None else (engines.made_in_child, (settings, ObjectRef, self.id))

    # asynchronous

    def __await__(self) -> Generator[Any, None, T_co]:
        loop = engines.loop_here("awaiting a ref")
        cell = self._followed_here()
        if not cell.has_ended:
            yield from cell.future(loop).__await__()
        return cell.read()  # type: ignore[no-any-return]

    def add_done_callback(self, callback: Callable[[Self], object], *, context: Any = None) -> None:
        """Call `callback(ref)` in the running loop once the request has ended; what `asyncio.wait` needs."""
        loop = engines.loop_here("a callback")
        future = self._followed_here().future(loop)
        future.add_done_callback(lambda _: callback(self), context=context)

    def remove_done_callback(self, callback: Callable[[Self], object]) -> int:
        """Accepted for `asyncio.wait`, which calls it on what is not done; a late callback finds nobody."""
        return 0

    def cancelled(self) -> bool:
        """Was the request cancelled, as far as this process has heard?"""
        return self._followed().was_cancelled

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
        self._followed_off_loop().on_end(ended)  # other threads may wait for it
        return future

    # ending and looking

    def cancel(self) -> bool:
        """Cancel the request, wherever it is, with the requests that it has sent; False if it had ended before.

        Whoever waits for it gets RequestCancelledError. Running code is cancelled if it is a coroutine, else only told
        (`serve.get_request_context().is_cancelled`), and its result is ignored; with options(kill_on_cancel=True) its
        replica is replaced. Blocks for one round trip; `await ref.acancel()` does not. BrokerUnavailableError.
        """
        if self._has_ended_here():
            return False
        engines.warn_if_on_a_loop("ref.cancel()", "`await ref.acancel()`")
        return self._ask_blocking(lambda engine: engine.endings.cancel(self._id))

    async def acancel(self) -> bool:
        """As `cancel`, without blocking the loop."""
        if self._has_ended_here():
            return False
        return await self._ask(lambda engine: engine.endings.cancel(self._id))

    def _has_ended_here(self) -> bool:
        """Has this process heard of its end, or will it never begin?"""
        return self._cell is not None and self._cell.has_ended and not self._cell.was_cut_off

    def cancel_unmatched(self) -> None:
        """Cancel the request soon, unless a replica has it or it is parked or delayed. For the task of `remote`."""
        cell, engine = self._cell, self._engine
        if cell is not None and engine is not None and not cell.is_matched and not engine.is_closed:
            engine.endings.cancel_soon([self._id])

    def status(self) -> State:
        """Where the request is: parked, delayed, queued, running, succeeded, failed, dead, cancelled or timed_out.

        Asks the server. Raises RefNotFoundError, BrokerUnavailableError.
        """
        engines.warn_if_on_a_loop("ref.status()", "`await ref.astatus()`")
        return self._ask_blocking(lambda engine: engine.chores.state(self._id))

    async def astatus(self) -> State:
        """As `status`, without blocking the loop."""
        return await self._ask(lambda engine: engine.chores.state(self._id))

    def _ask_blocking(self, what: Callable[[Engine], Coroutine[Any, Any, T]]) -> T:
        """Have the engine that sent the request do something; that of the background, if this thread holds up its loop."""
        engine = self._engine
        if engine is not None and _goes_on(engine):
            return engines.run_on(engine.loop, what(engine))
        background = engines.background()
        if engine is not None and not engine.is_closed:
            engine.resubmit_elsewhere(background.engine)  # ahead of what follows
        return background.run(what(background.engine))

    async def _ask(self, what: Callable[[Engine], Coroutine[Any, Any, T]]) -> T:
        """As `_ask_blocking`, from a loop."""
        engine, here = self._engine, engines.current()
        if engine is None or engine is here or engine.is_closed:
            return await what(here)
        if _goes_on(engine):
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(what(engine), engine.loop))
        engine.resubmit_elsewhere(here)
        await asyncio.sleep(0)  # so that we have it
        return await what(here)

    # synchronous

    def done(self) -> bool:
        """Has the request ended, as far as this process has heard?"""
        return self._followed().has_ended

    def result(self, timeout: float | None = None, *, timeout_s: float | None = None) -> T_co:
        """Block for the value, at most `timeout` seconds. Raises the request's error, GetTimeoutError, RefNotFoundError.

        `timeout_s` is Ray's name for `timeout`.
        """
        timeout = timeout_s if timeout is None else timeout
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

    def _send_ahead(self, engine: Engine) -> None:
        """This engine is about to speak of our request to the server, where ours may not have sent it yet. Any thread."""
        if self._cell is not None and not self._cell.is_matched:
            self._flush_to(engine)

    def _followed(self) -> Cell:
        """The cell, filled by some engine of this process."""
        return self._followed_off_loop() if engines.running_loop() is None else self._followed_here()

    def _followed_here(self) -> Cell:
        """The cell, filled by the engine of the running loop, or by that of all threads: any other may end before us."""
        with _lock:
            engine, cell = self._engine, self._cell
            if cell is None or engine is None or (engine.is_closed and not self._has_heard):
                return self._move_to(engines.current())
            if self._has_heard or engine.loop is engines.running_loop() or engines.is_background(engine):
                return cell
            return self._move_to(engines.background().engine)

    def _followed_off_loop(self) -> Cell:
        """The cell, filled by the engine of all threads, which goes on while this thread blocks."""
        with _lock:
            if self._cell is not None and (self._has_heard or engines.is_background(self._engine)):
                return self._cell
            return self._move_to(engines.background().engine)

    @property
    def _has_heard(self) -> bool:
        """Has the cell been filled, with an end that is one? A connection that was closed is none."""
        cell, engine = self._cell, self._engine
        assert cell is not None and engine is not None
        return cell.has_ended and not (engine.is_closed and cell.was_cut_off)

    def _move_to(self, engine: Engine) -> Cell:
        """A cell that this engine fills. It also sends what the former one, perhaps blocked, may not have sent."""
        tag, local = split_ref(self._id)
        self._is_shared = True  # by two engines: which of them may free it?
        cell = engine.cell_of(local.encode())
        if cell is None:
            self._send_ahead(engine)
            route = engine.route(tag)
            cell = Cell(route.codec, local.encode())
            if engine.loop is engines.running_loop():
                engine.chores.follow(route, cell)
            else:
                engine.loop.call_soon_threadsafe(engine.chores.follow, route, cell)
        self._engine, self._cell = engine, cell
        return cell

    def _flush_to(self, engine: Engine) -> None:
        """What our engine has not sent yet (its loop may be blocked) is sent by this one, ahead of what follows."""
        if self._engine is not None and self._engine is not engine and not self._engine.is_closed:
            self._engine.resubmit_elsewhere(engine)


def _goes_on(engine: Engine) -> bool:
    """Does its loop run, while this thread waits for something?"""
    return not engine.is_closed and engine.loop.is_running() and engine.loop is not engines.running_loop()
