"""`map` and `starmap` of both handles: many requests, pipelined, a bounded number in flight, in order or as they complete.

A request is sent when the consumer asks for a value, and never more than so many ahead of it. What is in flight when the
consumer stops asking goes on; its results are dropped. Errors come in their place: that of a request, that of an item
which cannot be sent, and that of the items themselves, which ends the iteration.
"""

import asyncio
import queue
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol, Unpack, overload

from millstream.broker.outcomes import same_kind
from millstream.errors import ConfigError, PayloadTooLargeError, SerializationError, TaskError
from millstream.handles import engines
from millstream.handles.cell import Cell
from millstream.handles.generics import R, R_co
from millstream.handles.map_types import AsyncMixed, Choices, Collecting, ManyRows, Mixed, Rows

Send = Callable[[int, Any], Cell]  # number of the item, item
Row = tuple[Any, ...]  # the arguments of one call
ROWS_AT_ONCE, ROWS_S = 64, 0.001  # so many are sent together, or what the items give in that time
_CANNOT_BE_SENT = (SerializationError, PayloadTooLargeError)


class How(NamedTuple):
    """What the caller of `map` may choose."""

    max_in_flight: int
    ordered: bool
    progress: bool
    return_exceptions: bool

    @property
    def refill_at(self) -> int:
        """While values are at hand, more are sent when only so many are under way: a few at once cost less. Who has to wait
        for a value sends all that may be under way first."""
        return self.max_in_flight - max(1, self.max_in_flight // 16)

    def check(self) -> None:
        if not isinstance(self.max_in_flight, int) or self.max_in_flight < 1:
            raise ConfigError(f"max_in_flight={self.max_in_flight!r} must be a whole number, 1 or more")


# for blocking callers


class _Blocking(Protocol[R_co]):
    """A SyncHandle, by what its calls give."""

    def call(self, *args: Any, **kwargs: Any) -> R_co: ...
    def _of_item(self, number: int) -> "_Blocking[R_co]": ...
    def _call_cell(self, args: Any, kwargs: Any, *, snapshot: bool = False) -> Cell: ...


def sync_map(
    self: _Blocking[Any],
    iterable: Iterable[Any],
    *,
    max_in_flight: int = 1000,
    ordered: bool = True,
    progress: bool = False,
    return_exceptions: bool = False,
) -> Iterator[Any]:
    """An iterator of the values of one call per item, at most `max_in_flight` of them under way.

    In the order of the items, or as they complete. Items are taken and sent when the next value is asked for. The
    first error is raised in its place and ends the iteration; with `return_exceptions` errors are values. What is
    under way when the iteration ends early goes on. An `idempotency_key` is completed by the number of the item.
    """
    how = How(max_in_flight, ordered, progress, return_exceptions)
    return _map_sync(lambda n, item: self._of_item(n)._call_cell((item,), {}, snapshot=True), iterable, how)


@overload
def sync_starmap(self: _Blocking[R], iterable: Rows, **how: Unpack[Choices]) -> Iterator[R]: ...
@overload
def sync_starmap(self: _Blocking[R], iterable: Rows, **how: Unpack[Collecting]) -> Mixed[R]: ...
def sync_starmap(
    self: _Blocking[Any],
    iterable: Rows,
    *,
    max_in_flight: int = 1000,
    ordered: bool = True,
    progress: bool = False,
    return_exceptions: bool = False,
) -> Iterator[Any]:
    """As `map`; each item holds all the arguments of its call."""
    how = How(max_in_flight, ordered, progress, return_exceptions)
    return _map_sync(lambda n, item: self._of_item(n)._call_cell(tuple(item), {}, snapshot=True), iterable, how)


def _map_sync(send: Send, items: Iterable[Any], how: How) -> Iterator[Any]:
    how.check()
    engines.warn_if_on_a_loop("SyncHandle.map()", "`async for` with a DeploymentHandle's map()", depth=4)
    if isinstance(items, AsyncIterable):
        raise TypeError(
            f"a SyncHandle takes items that `for` can go through, and {type(items).__name__} needs `async for`; "
            "use a DeploymentHandle's map(), or collect the items first"
        )
    source = _Source(send, iter(items))
    values = (_in_order if how.ordered else _as_completed)(source, how)
    return _with_progress(values, items) if how.progress else values


class _Unsent:
    """In place of the cell of an item that could not be sent."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def wait(self, timeout: float | None) -> bool:
        return True

    def read(self) -> Any:
        raise self._error


class _Source:
    """Sends one item at a time. An error of the items themselves is kept for the end."""

    def __init__(self, send: Send, items: Iterator[Any]) -> None:
        self._send, self._items = send, items
        self._count = 0
        self._is_over = False
        self._error: Exception | None = None

    def send_next(self) -> Cell | _Unsent | None:
        """None: there are no more."""
        if self._is_over:
            return None
        number = self._count
        try:
            item = next(self._items)
            self._count += 1
            return self._send(number, item)
        except _CANNOT_BE_SENT as e:
            return _Unsent(_named(e, number))
        except StopIteration:
            self._is_over = True
        except Exception as e:
            self._is_over, self._error = True, e
        return None

    def finish(self) -> None:
        if self._error is not None:
            raise self._error


def _in_order(source: _Source, how: How) -> Iterator[Any]:
    in_flight: deque[Cell | _Unsent] = deque()
    number = 0
    while True:
        while len(in_flight) < how.max_in_flight and (one := source.send_next()) is not None:
            in_flight.append(one)
        if not in_flight:
            break
        one = in_flight.popleft()
        one.wait(None)
        try:
            value = one.read()
        except Exception as e:
            value = _failed(e, number, how)
        yield value
        number += 1
    source.finish()


def _as_completed(source: _Source, how: How) -> Iterator[Any]:
    ended: queue.SimpleQueue[tuple[int, Cell | _Unsent]] = queue.SimpleQueue()
    sent = yielded = 0
    while True:
        while sent - yielded < how.max_in_flight and (one := source.send_next()) is not None:
            if isinstance(one, Cell):
                one.on_end(partial(_put, ended, sent))
            else:
                ended.put((sent, one))
            sent += 1
        if sent == yielded:
            break
        number, one = ended.get()
        yielded += 1
        try:
            value = one.read()
        except Exception as e:
            value = _failed(e, number, how)
        yield value
    source.finish()


def _put(ended: "queue.SimpleQueue[tuple[int, Cell | _Unsent]]", number: int, cell: Cell) -> None:
    ended.put((number, cell))


# on an event loop


class _Awaited(Protocol[R]):
    """A DeploymentHandle, by what its calls give."""

    def _of_item(self, number: int) -> "_Awaited[R]": ...
    def _call_rows(self, rows: list[Row]) -> list[Any]: ...
    def call(self, *args: Any, **kwargs: Any) -> "asyncio.Future[R]": ...


def async_map(
    self: _Awaited[Any],
    iterable: Iterable[Any] | AsyncIterable[Any],
    *,
    max_in_flight: int = 1000,
    ordered: bool = True,
    progress: bool = False,
    return_exceptions: bool = False,
) -> AsyncIterator[Any]:
    """An async iterator of the values of one call per item, at most `max_in_flight` of them under way.

    In the order of the items, or as they complete. Items are taken and sent when the next value is asked for. The
    first error is raised in its place and ends the iteration; with `return_exceptions` errors are values. What is
    under way when the iteration ends early goes on. An `idempotency_key` is completed by the number of the item.
    """
    how = How(max_in_flight, ordered, progress, return_exceptions)
    return _map_async(self, lambda item: (item,), iterable, how)


@overload
def async_starmap(self: _Awaited[R], iterable: ManyRows, **how: Unpack[Choices]) -> AsyncIterator[R]: ...
@overload
def async_starmap(self: _Awaited[R], iterable: ManyRows, **how: Unpack[Collecting]) -> AsyncMixed[R]: ...
def async_starmap(
    self: _Awaited[Any],
    iterable: ManyRows,
    *,
    max_in_flight: int = 1000,
    ordered: bool = True,
    progress: bool = False,
    return_exceptions: bool = False,
) -> AsyncIterator[Any]:
    """As `map`; each item holds all the arguments of its call."""
    how = How(max_in_flight, ordered, progress, return_exceptions)
    return _map_async(self, tuple, iterable, how)


def _map_async(
    handle: _Awaited[Any], row_of: Callable[[Any], Row], items: Iterable[Any] | AsyncIterable[Any], how: How
) -> AsyncIterator[Any]:
    how.check()
    source = _AsyncSource(handle, row_of, items)
    values = (_in_order_async if how.ordered else _as_completed_async)(source, how)
    return _with_progress_async(values, items) if how.progress else values


class _AsyncSource:
    """As `_Source`. What could not be sent is a future that has failed."""

    def __init__(
        self, handle: _Awaited[Any], row_of: Callable[[Any], Row], items: Iterable[Any] | AsyncIterable[Any]
    ) -> None:
        self._handle, self._row_of = handle, row_of
        self._items: Iterator[Any] = iter(()) if isinstance(items, AsyncIterable) else iter(items)
        self._async_items = aiter(items) if isinstance(items, AsyncIterable) else None
        self._count = 0
        self._error: Exception | None = None

    async def send(self, most: int) -> "list[asyncio.Future[Any]]":
        """Send up to so many; one at a time where the items have to be awaited. None sent: there are no more."""
        rows: list[Row] = []
        sent: list[asyncio.Future[Any]] = []
        if not most:
            return sent
        try:
            if self._async_items is not None:
                rows.append(self._row_of(await anext(self._async_items)))
            else:
                self._take(rows, min(most, ROWS_AT_ONCE))
        except StopAsyncIteration:
            self._async_items = None
        except Exception as e:
            self._end(e)
        try:
            self._send_rows(sent, rows)
        except Exception as e:
            self._end(e)
        return sent

    def _take(self, rows: list[Row], most: int) -> None:
        until_s = time.monotonic() + ROWS_S
        for item in islice(self._items, most):
            rows.append(self._row_of(item))
            if time.monotonic() > until_s:
                return  # items that come slowly are not kept waiting for each other
        if len(rows) < most:
            self._items = iter(())  # some would begin again

    def _end(self, error: Exception) -> None:
        self._items, self._async_items, self._error = iter(()), None, error

    def _send_rows(self, sent: "list[asyncio.Future[Any]]", rows: list[Row]) -> None:
        first, self._count = self._count, self._count + len(rows)
        for number, (row, future) in enumerate(zip(rows, self._handle._call_rows(rows), strict=True), first):
            sent.append(future or self._send_one(number, row))

    def _send_one(self, number: int, row: Row) -> "asyncio.Future[Any]":
        try:
            return self._handle._of_item(number).call(*row)
        except _CANNOT_BE_SENT as e:
            failed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            failed.set_exception(_named(e, number))
            return failed

    def finish(self) -> None:
        if self._error is not None:
            raise self._error


async def _in_order_async(source: _AsyncSource, how: How) -> AsyncIterator[Any]:
    in_flight: deque[asyncio.Future[Any]] = deque()
    number = 0
    try:
        while True:
            if len(in_flight) <= how.refill_at or not in_flight[0].done():
                while sent := await source.send(how.max_in_flight - len(in_flight)):
                    in_flight += sent
            if not in_flight:
                break
            one = in_flight.popleft()
            try:
                value = one.result() if one.done() else await one
            except Exception as e:
                value = _failed(e, number, how)
            yield value
            number += 1
    finally:
        for future in in_flight:
            _disown(future)
    source.finish()


async def _as_completed_async(source: _AsyncSource, how: How) -> AsyncIterator[Any]:
    ended: asyncio.Queue[asyncio.Future[Any]] = asyncio.Queue()
    in_flight: dict[asyncio.Future[Any], int] = {}
    count = 0
    try:
        while True:
            if len(in_flight) <= how.refill_at or ended.empty():
                while sent := await source.send(how.max_in_flight - len(in_flight)):
                    for one in sent:
                        in_flight[one] = count
                        one.add_done_callback(ended.put_nowait)
                        count += 1
            if not in_flight:
                break
            future = await ended.get()
            number = in_flight.pop(future)
            try:
                value = future.result()
            except Exception as e:
                value = _failed(e, number, how)
            yield value
    finally:
        for future in in_flight:
            _disown(future)
    source.finish()


def _disown(future: "asyncio.Future[Any]") -> None:
    """Nobody will ask for this value: an error in it must not be reported as forgotten."""
    future.add_done_callback(lambda done: done.cancelled() or done.exception())


# errors, and the bar


def _named(error: Exception, number: int) -> Exception:
    """The same error, which says in its text which item cannot be sent."""
    named = type(error)(f"item {number} of map(): {error}", **{**error.__dict__, "item": number})
    named.__cause__ = error.__cause__
    return named


def _failed(error: Exception, number: int, how: How) -> Exception:
    """Return or raise it, with a note of which item it is of: where order does not matter, nothing else says so."""
    own = error
    if not isinstance(error, _CANNOT_BE_SENT):
        if not isinstance(error, TaskError):
            own = same_kind(error)  # type: ignore[assignment] # one error may be that of many requests
        own.add_note(f"(item {number} of map())")
    if how.return_exceptions:
        return own
    if own is error:
        raise error
    raise own from None


@contextmanager
def _bar(items: Any) -> Iterator[Callable[[], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        row = bar.add_task("requests", total=len(items) if hasattr(items, "__len__") else None)
        yield lambda: bar.advance(row)


def _with_progress(values: Iterator[Any], items: Any) -> Iterator[Any]:
    with _bar(items) as advance:
        for value in values:
            advance()
            yield value


async def _with_progress_async(values: AsyncIterator[Any], items: Any) -> AsyncIterator[Any]:
    async with aclosing(values):  # type: ignore[type-var]
        with _bar(items) as advance:
            async for value in values:
                advance()
                yield value
