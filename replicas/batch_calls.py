"""What a batch is made of: the function and its settings, the calls that wait for it, and how their answers get to them."""

import asyncio
import contextlib
import contextvars
import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from millstream.errors import MillstreamError
from millstream.handles.context import current
from millstream.replicas.batch_arguments import Parameters


@dataclass(frozen=True, slots=True)
class Limits:
    """When calls become a batch: so many of them, or so long after the first."""

    max_batch_size: int
    batch_wait_timeout_s: float


class Batching:
    """A function and how it is batched. Parameters only, so it pickles with the class it is in."""

    def __init__(
        self,
        function: Callable[..., Any],
        limits: Limits,
        max_concurrent_batches: int,
        batch_size_fn: Callable[[list[Any]], float] | None,
    ) -> None:
        self.function, self.limits = function, limits
        self.max_concurrent_batches, self.batch_size_fn = max_concurrent_batches, batch_size_fn
        self.name: str = getattr(function, "__qualname__", repr(function))
        self.is_generator = inspect.isasyncgenfunction(function)
        self.has_warned = False
        self._of_function = Parameters(function, self.name, without_self=False)
        self._of_method = Parameters(function, self.name, without_self=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return Batching, (self.function, self.limits, self.max_concurrent_batches, self.batch_size_fn)

    def parameters(self, instance: Any) -> Parameters:
        """Those that callers give: without `self`, if there is an instance."""
        return self._of_function if instance is None else self._of_method

    def call(self, instance: Any, calls: Sequence["Call"]) -> Any:
        """Call the function for all of them: what it returns, a coroutine or an async generator. MillstreamError."""
        args, kwargs = self.parameters(instance).columns([call.arguments for call in calls])
        return self.function(*args, **kwargs) if instance is None else self.function(instance, *args, **kwargs)


class Call:
    """One call that waits for its batch, or for its answer."""

    def __init__(self, arguments: dict[str, Any], now: float) -> None:
        request = current.get()
        self.model_id = "" if request is None else request.model_id
        self.arguments, self.since = arguments, now
        self.context = contextvars.copy_context()

    @property
    def item(self) -> Any:
        """What `batch_size_fn` gets to see of it: its first argument."""
        return next(iter(self.arguments.values()), None)

    @property
    def is_over(self) -> bool:
        """It has its answer, or its caller is gone."""
        raise NotImplementedError

    def fail(self, error: BaseException) -> None:
        raise NotImplementedError


class Single(Call):
    """A call of a coroutine function: one answer."""

    def __init__(self, arguments: dict[str, Any], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(arguments, loop.time())
        self.answer: asyncio.Future[Any] = loop.create_future()

    @property
    def is_over(self) -> bool:
        return self.answer.done()

    def succeed(self, value: Any) -> None:
        if not self.answer.done():
            self.answer.set_result(value)

    def fail(self, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):
            self.answer.cancel()
        elif not self.answer.done():
            self.answer.set_exception(error)


class Stream(Call):
    """A call of an async generator function: any number of items. They wait here until the caller takes them."""

    def __init__(self, arguments: dict[str, Any], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(arguments, loop.time())
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self._is_over = False

    @property
    def is_over(self) -> bool:
        return self._is_over

    def add(self, item: Any) -> None:
        if item is StopIteration or item is StopAsyncIteration:
            self.end()
        elif not self._is_over:
            self._items.put_nowait(item)

    def end(self) -> None:
        self._finish(_End(None, None))

    def fail(self, error: BaseException) -> None:
        self._finish(_End(error, error.__traceback__))

    def leave(self) -> None:
        """The caller takes no more."""
        self._is_over = True

    def _finish(self, end: "_End") -> None:
        if not self._is_over:
            self._is_over = True
            self._items.put_nowait(end)

    async def items(self) -> AsyncIterator[Any]:
        while not isinstance(item := await self._items.get(), _End):
            yield item
        if item.error is not None:
            raise item.error.with_traceback(item.traceback)  # not with the frames of those who raised it before us


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None
    traceback: Any


async def hand_out(results: Any, calls: Sequence[Single], name: str) -> None:
    """Await the list of results and give each call its own."""
    for call, result in zip(calls, _one_for_each(await results, len(calls), name, "returned"), strict=True):
        call.succeed(result)


async def hand_out_items(lists: Any, calls: Sequence[Stream], name: str) -> None:
    """Go through an async generator of lists, and give each call its item of each; stop when no call wants more."""
    async with contextlib.aclosing(lists):
        async for items in lists:
            for call, item in zip(calls, _one_for_each(items, len(calls), name, "yielded"), strict=True):
                call.add(item)
            if all(call.is_over for call in calls):
                return
    for call in calls:
        call.end()


def _one_for_each(results: Any, count: int, name: str, verb: str) -> Iterable[Any]:
    try:
        length = len(results)
    except TypeError:
        raise MillstreamError(
            f"@serve.batch: {name} {verb} {type(results).__name__}; for a batch of {count} calls it must be a list of "
            f"{count} items, one per call, in their order"
        ) from None
    if length != count:
        raise MillstreamError(
            f"@serve.batch: {name} {verb} {length} items for a batch of {count} calls; there must be one per call, in "
            "their order"
        )
    return results  # type: ignore[no-any-return]
