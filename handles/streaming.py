"""Reading the items of a generator method, as they are produced: `for` and `async for` over a StreamCell."""

import asyncio
import threading
import time
from concurrent.futures import CancelledError
from typing import Any, Generic, NoReturn, Self

from millstream.errors import BrokerUnavailableError, GetTimeoutError, MillstreamError
from millstream.handles import engines
from millstream.handles.generics import T_co
from millstream.handles.stream_cell import StreamCell, is_elsewhere


class _Items:
    """What both faces share."""

    def __init__(self, cell: StreamCell) -> None:
        self._cell = cell
        self._turn = threading.Lock()  # the reader's

    def _take_turn(self) -> None:
        if not self._turn.acquire(blocking=False):
            raise RuntimeError(f"stream {self._cell.ref_id} is being read already: one reader at a time")

    @property
    def ref_id(self) -> str:
        """The id of the request: for `ObjectRef.from_id(...).status()`, `cancel()`, or `millstream ref`.

        Once it was read, how the request ended is kept for its TTL; items are not.
        """
        self._cell.is_shared = True
        return self._cell.ref_id

    def __del__(self) -> None:
        if (cell := self.__dict__.get("_cell")) is not None:
            cell.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a stream stays where it was opened; pass on its items, or call again over there")

    def __await__(self) -> NoReturn:
        raise TypeError("a stream is not awaited: write `async for item in stream`, or call without stream=True")

    def result(self, timeout: float | None = None) -> NoReturn:
        """Ray's answer to what has no single result."""
        raise TypeError("a stream has no single result: iterate over it, or call without stream=True")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._cell.ref_id})"


class AsyncStream(_Items, Generic[T_co]):
    """The items of a generator method, for `async for`. Belongs to the loop that it was made on, and to one reader."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T_co:
        """The next item. Raises the generator's error after the items before it; a cancelled wait loses no item."""
        cell = self._cell
        self._take_turn()
        try:
            while not cell.is_closed:
                if (stored := cell.peek()) is not None:
                    if is_elsewhere(stored):
                        return await self._read_large(stored)  # type: ignore[no-any-return]
                    cell.advance(stored)
                    return cell.open(stored)  # type: ignore[no-any-return]
                if cell.is_complete:
                    cell.close()
                    cell.raise_error()
                else:
                    await self._news()
        finally:
            self._turn.release()
        raise StopAsyncIteration

    async def _read_large(self, stored: bytes) -> Any:
        try:
            large = await self._cell.read_large(stored)
        except (BrokerUnavailableError, asyncio.CancelledError):
            raise  # to be read again
        except BaseException:
            self._cell.advance(stored)
            raise
        self._cell.advance(stored)
        return large.load()

    async def aclose(self) -> None:
        """Read no further: a request that still runs is cancelled."""
        self._cell.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _news(self) -> None:
        loop = asyncio.get_running_loop()
        if loop is not self._cell.engine.loop:
            raise RuntimeError("a stream belongs to the event loop that it was made on")
        future: asyncio.Future[None] = loop.create_future()
        self._cell.wait_for_news(lambda: None if future.done() else future.set_result(None))
        try:
            await future
        finally:
            self._cell.wait_for_news(None)


class Stream(_Items, Generic[T_co]):
    """The items of a generator method, for `for`. From any thread, one at a time."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T_co:
        """The next item; blocks for it. Raises the generator's error after the items before it."""
        return self.next(None)

    def next(self, timeout: float | None) -> T_co:
        """As `next(stream)`, at most `timeout` seconds; then GetTimeoutError, and nothing is lost."""
        engines.warn_if_on_a_loop("iterating over a SyncHandle's stream", "`async for` with a DeploymentHandle's")
        cell, deadline = self._cell, None if timeout is None else time.monotonic() + timeout
        self._take_turn()
        try:
            while not cell.is_closed:
                if (stored := cell.peek()) is not None:
                    if is_elsewhere(stored):
                        return self._read_large(stored, _left(deadline))  # type: ignore[no-any-return]
                    cell.advance(stored)
                    return cell.open(stored)  # type: ignore[no-any-return]
                if cell.is_complete:
                    cell.close()
                    cell.raise_error()
                else:
                    self._news(_left(deadline))
        except TimeoutError as e:
            if isinstance(e, MillstreamError) or deadline is None or time.monotonic() < deadline:
                raise
            raise GetTimeoutError(
                f"stream {cell.ref_id} had no further item within {timeout} s; it goes on: ask again",
                ref_id=cell.ref_id,
            ) from None
        finally:
            self._turn.release()
        raise StopIteration

    def _read_large(self, stored: bytes, timeout: float | None) -> Any:
        self._raise_if_cut_off()
        future = asyncio.run_coroutine_threadsafe(self._cell.read_large(stored), self._cell.engine.loop)
        try:
            large = future.result(timeout)
        except (BrokerUnavailableError, TimeoutError, CancelledError, KeyboardInterrupt):
            future.cancel()
            self._raise_if_cut_off()
            raise  # to be read again
        except BaseException:
            self._cell.advance(stored)
            raise
        self._cell.advance(stored)
        return large.load()

    def close(self) -> None:
        """Read no further: a request that still runs is cancelled. From any thread; who waits for an item gets none."""
        self._cell.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _news(self, timeout: float | None) -> None:
        """Wait until there may be something new. Raises TimeoutError."""
        cell, news = self._cell, threading.Event()
        cell.wait_for_news(news.set)
        try:
            if cell.peek() is not None or cell.is_complete or cell.is_closed:
                return
            self._raise_if_cut_off()
            if not news.wait(timeout):
                raise TimeoutError
        finally:
            cell.wait_for_news(None)

    def _raise_if_cut_off(self) -> None:
        """Say so if nothing more can come: `shutdown` was called, or this is a forked child."""
        if self._cell.engine.is_closed:
            engines.stay_behind_at_exit()
            raise BrokerUnavailableError(
                f"stream {self._cell.ref_id} belongs to a connection that was closed, or to the parent of this process; "
                "call again"
            )


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
