"""`handle.map`: many requests, pipelined, a bounded number in flight, in order or as they complete."""

import asyncio
import queue
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, TypedDict

from millstream.errors import ConfigError
from millstream.handles.arguments import Argument
from millstream.handles.cell import Cell
from millstream.handles.generics import A

Send = Callable[[Any], Cell]
Many: TypeAlias = Iterable[Argument[A]] | AsyncIterable[Argument[A]]


class How(TypedDict, total=False):
    """How `map` goes about it: its keywords, for the overloads."""

    max_in_flight: int
    ordered: bool
    progress: bool


def map_sync(send: Send, items: Iterable[Any], max_in_flight: int, *, ordered: bool, progress: bool) -> Iterator[Any]:
    _check(max_in_flight)
    values = _in_order(send, items, max_in_flight) if ordered else _as_completed(send, items, max_in_flight)
    return _with_progress(values, items) if progress else values


def _in_order(send: Send, items: Iterable[Any], max_in_flight: int) -> Iterator[Any]:
    in_flight: deque[Cell] = deque()
    for item in items:
        in_flight.append(send(item))
        if len(in_flight) >= max_in_flight:
            yield _value(in_flight.popleft())
    while in_flight:
        yield _value(in_flight.popleft())


def _as_completed(send: Send, items: Iterable[Any], max_in_flight: int) -> Iterator[Any]:
    ended: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    count = 0
    for item in items:
        send(item).on_end(ended.put)
        count += 1
        if count >= max_in_flight:
            yield ended.get().read()
            count -= 1
    for _ in range(count):
        yield ended.get().read()


def _value(cell: Cell) -> Any:
    cell.wait(None)
    return cell.read()


def map_async(
    call: Callable[[Any], asyncio.Future[Any]],
    items: Iterable[Any] | AsyncIterable[Any],
    max_in_flight: int,
    *,
    ordered: bool,
    progress: bool,
) -> AsyncIterator[Any]:
    _check(max_in_flight)
    source = items if isinstance(items, AsyncIterable) else _as_async(items)
    values = (_in_order_async if ordered else _as_completed_async)(call, source, max_in_flight)
    return _with_progress_async(values, items) if progress else values


async def _as_async(items: Iterable[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item


async def _in_order_async(
    call: Callable[[Any], asyncio.Future[Any]], items: AsyncIterable[Any], max_in_flight: int
) -> AsyncIterator[Any]:
    in_flight: deque[asyncio.Future[Any]] = deque()
    try:
        async for item in items:
            in_flight.append(call(item))
            if len(in_flight) >= max_in_flight:
                yield await in_flight.popleft()
        while in_flight:
            yield await in_flight.popleft()
    finally:
        for future in in_flight:
            _disown(future)


async def _as_completed_async(
    call: Callable[[Any], asyncio.Future[Any]], items: AsyncIterable[Any], max_in_flight: int
) -> AsyncIterator[Any]:
    ended: asyncio.Queue[asyncio.Future[Any]] = asyncio.Queue()
    in_flight: set[asyncio.Future[Any]] = set()

    async def one() -> Any:
        future = await ended.get()
        in_flight.discard(future)
        return future.result()

    try:
        async for item in items:
            future = call(item)
            in_flight.add(future)
            future.add_done_callback(ended.put_nowait)
            if len(in_flight) >= max_in_flight:
                yield await one()
        while in_flight:
            yield await one()
    finally:
        for future in in_flight:
            _disown(future)


def _disown(future: asyncio.Future[Any]) -> None:
    """Nobody will ask for this value: an error in it must not be reported as forgotten."""
    future.add_done_callback(lambda done: done.cancelled() or done.exception())


def _check(max_in_flight: int) -> None:
    if not isinstance(max_in_flight, int) or max_in_flight < 1:
        raise ConfigError(f"max_in_flight={max_in_flight!r} must be a whole number, 1 or more")


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
    with _bar(items) as advance:
        async for value in values:
            advance()
            yield value
