"""`map` and `starmap` of both handles: many requests, pipelined, a bounded number in flight, in order or as they complete.

A request is sent when the consumer asks for a value, and never more than so many ahead of it. What is in flight when the
consumer stops asking goes on; its results are dropped. Errors come in their place: that of a request, that of an item
which cannot be sent, and that of the items themselves, which ends the iteration.
"""

import asyncio
import queue
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, Unpack, overload

from millstream.broker.outcomes import same_kind
from millstream.errors import ConfigError, TaskError
from millstream.handles import engines
from millstream.handles.generics import R, R_co
from millstream.handles.item import Item
from millstream.handles.map_types import AsyncMixed, Choices, Collecting, ManyRows, Mixed, Rows
from millstream.handles.sending import CANNOT_BE_SENT, AsyncSource, Row, SendsRows, Source, refuse_async

REFILL = 32  # while values are at hand, so many are sent together: one by one they cost more


class How(NamedTuple):
    """What the caller of `map` may choose."""

    max_in_flight: int
    ordered: bool
    progress: bool
    return_exceptions: bool

    def bounds(self) -> tuple[int, int]:
        """At most so many are under way. While values are at hand, more are sent when only the second number of them are;
        who has to wait for a value sends all that may be under way first."""
        return self.max_in_flight, self.max_in_flight - max(1, min(REFILL, self.max_in_flight // 8))

    def check(self) -> None:
        if not isinstance(self.max_in_flight, int) or self.max_in_flight < 1:
            raise ConfigError(f"max_in_flight={self.max_in_flight!r} must be a whole number, 1 or more")


# for blocking callers


class _Blocking(SendsRows, Protocol[R_co]):
    """A SyncHandle, by what its calls give."""

    def call(self, *args: Any, **kwargs: Any) -> R_co: ...


def sync_map(
    self: SendsRows,
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
    return _map_sync(self, _alone, iterable, How(max_in_flight, ordered, progress, return_exceptions))


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
    return _map_sync(self, tuple, iterable, How(max_in_flight, ordered, progress, return_exceptions))


def _map_sync(handle: SendsRows, row_of: Callable[[Any], Row], items: Iterable[Any], how: How) -> Iterator[Any]:
    how.check()
    engines.warn_if_on_a_loop("SyncHandle.map()", "`async for` with a DeploymentHandle's map()", depth=4)
    refuse_async(items)
    source = Source(handle, row_of, items)
    values = (_in_order if how.ordered else _as_completed)(source, how)
    return _with_progress(values, items) if how.progress else values


class _Turnstile:
    """Lets one thread through when the item that it waits for is over."""

    def __init__(self) -> None:
        self._passes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._awaited: Item | None = None

    def tell(self, item: Item) -> None:
        if item is self._awaited:
            self._passes.put(None)

    def wait(self, item: Item) -> None:
        self._awaited = item  # which `tell` looks at once the item is over: one of us sees what the other has done
        while not item.is_over:
            self._passes.get()  # it may be for the item before


def _in_order(source: Source, how: How) -> Iterator[Any]:
    in_flight: deque[Item] = deque()
    most, refill_at = how.bounds()
    turnstile = _Turnstile()
    make = partial(Item, turnstile.tell)
    while True:
        if not source.is_over and (len(in_flight) <= refill_at or not in_flight[0].is_over):
            while sent := source.send(most - len(in_flight), make):
                in_flight += sent
        if not in_flight:
            break
        one = in_flight.popleft()
        if not one.is_over:
            turnstile.wait(one)
        try:
            value = one.read()
        except Exception as e:
            value = _failed(e, one.number, how)
        yield value
    source.finish()


def _as_completed(source: Source, how: How) -> Iterator[Any]:
    ended: queue.SimpleQueue[Item] = queue.SimpleQueue()
    make = partial(Item, ended.put)
    most, refill_at = how.bounds()
    in_flight = 0
    while True:
        if not source.is_over and (in_flight <= refill_at or ended.empty()):
            while sent := source.send(most - in_flight, make):
                in_flight += len(sent)
        if not in_flight:
            break
        one = ended.get()
        in_flight -= 1
        try:
            value = one.read()
        except Exception as e:
            value = _failed(e, one.number, how)
        yield value
    source.finish()


# on an event loop


class _Awaited(SendsRows, Protocol[R]):
    """A DeploymentHandle, by what its calls give."""

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
    return _map_async(self, _alone, iterable, How(max_in_flight, ordered, progress, return_exceptions))


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
    return _map_async(self, tuple, iterable, How(max_in_flight, ordered, progress, return_exceptions))


def _map_async(
    handle: SendsRows, row_of: Callable[[Any], Row], items: Iterable[Any] | AsyncIterable[Any], how: How
) -> AsyncIterator[Any]:
    how.check()
    source = AsyncSource(handle, row_of, items)
    values = (_in_order_async if how.ordered else _as_completed_async)(source, how)
    return _with_progress_async(values, items) if how.progress else values


class _Bell:
    """Wakes the one task that waits for an item."""

    def __init__(self) -> None:
        self._awaited: Item | None = None
        self._rings: asyncio.Future[None] | None = None

    def tell(self, item: Item) -> None:
        if item is self._awaited:
            self.ring()

    def ring(self) -> None:
        if self._rings is not None and not self._rings.done():
            self._rings.set_result(None)

    async def wait(self, item: Item | None = None) -> None:
        """For the end of this one; without one, for the next `ring`."""
        self._awaited, self._rings = item, asyncio.get_running_loop().create_future()
        await self._rings


async def _in_order_async(source: AsyncSource, how: How) -> AsyncIterator[Any]:
    in_flight: deque[Item] = deque()
    most, refill_at = how.bounds()
    bell = _Bell()
    make = partial(Item, bell.tell)
    while True:
        if not source.is_over and (len(in_flight) <= refill_at or not in_flight[0].is_over):
            while sent := await source.send_soon(most - len(in_flight), make):
                in_flight += sent
        if not in_flight:
            break
        one = in_flight.popleft()
        if not one.is_over:
            await bell.wait(one)
        try:
            value = one.read()
        except Exception as e:
            value = _failed(e, one.number, how)
        yield value
    source.finish()


async def _as_completed_async(source: AsyncSource, how: How) -> AsyncIterator[Any]:
    ended: deque[Item] = deque()
    bell, in_flight = _Bell(), 0

    def tell(item: Item) -> None:
        ended.append(item)
        bell.ring()

    make = partial(Item, tell)
    most, refill_at = how.bounds()
    while True:
        if not source.is_over and (in_flight <= refill_at or not ended):
            while sent := await source.send_soon(most - in_flight, make):
                in_flight += len(sent)
        if not in_flight:
            break
        if not ended:
            await bell.wait()
        one = ended.popleft()
        in_flight -= 1
        try:
            value = one.read()
        except Exception as e:
            value = _failed(e, one.number, how)
        yield value
    source.finish()


def _alone(item: Any) -> Row:
    return (item,)


# errors, and the bar


def _failed(error: Exception, number: int, how: How) -> Exception:
    """Return or raise it, with a note of which item it is of: where order does not matter, nothing else says so."""
    own = error
    if not isinstance(error, CANNOT_BE_SENT):
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
