"""Many requests at once: the sending half of `map`, which takes items as they are wanted, and of `map_refs`."""

import time
from collections.abc import AsyncIterable, Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Protocol, TypeVar

from millstream.broker.codec import Codec
from millstream.errors import PayloadTooLargeError, SerializationError
from millstream.handles.route import Pending

P = TypeVar("P", bound=Pending)
Row = tuple[Any, ...]  # the arguments of one call
Make = Callable[[Codec, bytes, float, int], P]  # codec, ref, since, number: who waits for the end of one request
ROWS_AT_ONCE, ROWS_S = 64, 0.001  # so many are sent together, or what the items give in that time
CANNOT_BE_SENT = (SerializationError, PayloadTooLargeError)


class SendsRows(Protocol):
    """A handle."""

    def _send_rows(
        self, rows: list[Row], first: int, make: Make[P], sent: list[P], *, until_queued: bool = False
    ) -> None: ...


def named(error: Exception, number: int) -> Exception:
    """The same error of what cannot be sent, with a text that says which one that is."""
    own = type(error)(f"item {number}: {error}", **{**error.__dict__, "item": number})
    own.__cause__ = error.__cause__
    return own


def refuse_async(items: Any) -> None:
    """For a blocking handle."""
    if isinstance(items, AsyncIterable):
        raise TypeError(
            f"a SyncHandle takes items that `for` can go through, and {type(items).__name__} needs `async for`; "
            "use a DeploymentHandle, or collect the items first"
        )


class Source:
    """Sends up to so many items at a time. An error of the items themselves is kept for the end."""

    def __init__(self, handle: SendsRows, row_of: Callable[[Any], Row], items: Iterable[Any]) -> None:
        self._handle, self._row_of = handle, row_of
        self._items: Iterator[Any] = iter(items)
        self._count = 0
        self._error: Exception | None = None
        self.is_over = False  # there are no more items

    def send(self, most: int, make: Make[P], *, until_queued: bool = False) -> list[P]:
        """None sent: there are no more, or none were wanted. `make` makes who waits for each."""
        rows: list[Row] = []
        if most:
            try:
                self._take(rows, min(most, ROWS_AT_ONCE))
            except Exception as e:
                self._end(e)
        return self._send_rows(rows, make, until_queued)

    def finish(self) -> None:
        if self._error is not None:
            raise self._error

    def _take(self, rows: list[Row], most: int) -> None:
        until_s = time.monotonic() + ROWS_S
        for item in islice(self._items, most):
            rows.append(self._row_of(item))
            if time.monotonic() > until_s:
                return  # items that come slowly are not kept waiting for each other
        if len(rows) < most:
            self._items, self.is_over = iter(()), True  # some iterators would begin again

    def _send_rows(self, rows: list[Row], make: Make[P], until_queued: bool) -> list[P]:
        sent: list[P] = []
        if rows:
            first, self._count = self._count, self._count + len(rows)
            try:
                self._handle._send_rows(rows, first, make, sent, until_queued=until_queued)
            except Exception as e:
                self._end(e)
        return sent

    def _end(self, error: Exception) -> None:
        self._items, self._error, self.is_over = iter(()), error, True


class AsyncSource(Source):
    """As `Source`, and one at a time where the items have to be awaited."""

    def __init__(
        self, handle: SendsRows, row_of: Callable[[Any], Row], items: Iterable[Any] | AsyncIterable[Any]
    ) -> None:
        is_async = isinstance(items, AsyncIterable)
        super().__init__(handle, row_of, () if is_async else items)  # type: ignore[arg-type]
        self._async_items = aiter(items) if is_async else None  # type: ignore[arg-type]

    async def send_soon(self, most: int, make: Make[P], *, until_queued: bool = False) -> list[P]:
        if self._async_items is None or not most:
            return self.send(most, make, until_queued=until_queued)
        rows: list[Row] = []
        try:
            rows.append(self._row_of(await anext(self._async_items)))
        except StopAsyncIteration:
            self._async_items, self.is_over = None, True
        except Exception as e:
            self._end(e)
        return self._send_rows(rows, make, until_queued)

    def _end(self, error: Exception) -> None:
        super()._end(error)
        self._async_items = None
