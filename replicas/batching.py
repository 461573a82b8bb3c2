"""`serve.batch`: calls that come close together become one call, with lists in place of values.

The decorator and what it makes of a function. How calls are put together is in `batch_queue.py`.
"""

import asyncio
import functools
import inspect
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Collection, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeAlias, TypeVar, overload

from millstream.broker.definitions import importable
from millstream.errors import ConfigError
from millstream.replicas.batch_calls import Batching, Limits, Single, Stream
from millstream.replicas.batch_queue import Queue, limits_of, queue_of
from millstream.replicas.belongings import keep_with

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
_Lists: TypeAlias = Callable[..., Coroutine[Any, Any, Collection[R]]]
_Generator: TypeAlias = Callable[..., AsyncIterable[Collection[R]]]


class Batched(functools.partial[Any], Generic[R_co]):
    """A function under `serve.batch`: called with one value, it answers what the function returned for that value.

    On an instance it is a method. A partial, because that is what `inspect` looks through: whoever asks whether this is
    a coroutine function, to know how to run it, gets the right answer.
    """

    __name__: str  # of the function, as its other names and its docstring

    if TYPE_CHECKING:  # with a value for each list; that cannot be said of any number of them

        def __call__(self, /, *args: Any, **kwargs: Any) -> R_co: ...

    def __get__(self, instance: Any, owner: type | None = None) -> Self:
        batching: Batching = self.args[0]
        found = type(self)(self.func, batching) if instance is None else type(self)(self.func, batching, instance)
        found.__dict__.update(self.__dict__)
        if instance is not None:
            found.__dict__["__signature__"] = batching.parameters(instance).signature
        return found

    def set_max_batch_size(self, max_batch_size: int) -> None:
        """From the next batch on, of this instance only; a batch that calls wait for already stays as it is.

        Made to be called by `reconfigure`. Raises TypeError and ValueError as the decorator does.
        """
        self._set(max_batch_size=_checked_size(max_batch_size))

    def set_batch_wait_timeout_s(self, batch_wait_timeout_s: float) -> None:
        """As `set_max_batch_size`."""
        self._set(batch_wait_timeout_s=_checked_wait(batch_wait_timeout_s))

    def _set(self, **changes: Any) -> None:
        batching: Batching = self.args[0]
        instance = self.args[1] if len(self.args) > 1 else None
        changed = replace(limits_of(batching, instance), **changes)
        if instance is None:
            batching.limits = changed
        else:
            keep_with(instance)[batching.name] = changed

    def __repr__(self) -> str:
        return f"<serve.batch of {self.args[0].name}>"

    def __reduce__(self) -> Any:
        # By name where there is one, as functions are: by value, a function takes its module's globals along.
        name = self.__dict__.get("__qualname__")
        return name if name is not None and importable(self) is not None else super().__reduce__()


class BatchedGenerator(Batched[R_co]):
    """As `Batched`, of an async generator function: a call gives an async generator."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """The call takes part in the next batch whether or not anybody asks the generator for an item yet."""
        return self.func(*_put(Stream, *self.args, *args, **kwargs))


async def _answer(batching: Batching, instance: Any, /, *args: Any, **kwargs: Any) -> Any:
    queue, call = _put(Single, batching, instance, *args, **kwargs)
    try:
        return await call.answer
    except asyncio.CancelledError:
        queue.drop(call)
        raise


async def _items(queue: Queue, call: Stream) -> AsyncIterator[Any]:
    try:
        async for item in call.items():
            yield item
    finally:
        call.leave()
        queue.drop(call)


def _put(kind: Any, batching: Batching, instance: Any, /, *args: Any, **kwargs: Any) -> tuple[Queue, Any]:
    """Put a call into its queue. Raises TypeError for arguments that the function does not take."""
    arguments = batching.parameters(instance).bind(args, kwargs)
    queue = queue_of(batching, instance)
    call = kind(arguments, queue.loop)
    queue.put(call)
    return queue, call


class _Decorator(Protocol):
    @overload
    def __call__(self, function: _Lists[R], /) -> Batched[Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(self, function: _Generator[R], /) -> Batched[AsyncGenerator[R, None]]: ...


@overload
def batch(_func: _Lists[R], /) -> Batched[Coroutine[Any, Any, R]]: ...
@overload
def batch(_func: _Generator[R], /) -> Batched[AsyncGenerator[R, None]]: ...
@overload
def batch(
    _func: None = None,
    /,
    max_batch_size: int = 10,
    batch_wait_timeout_s: float = 0.01,
    max_concurrent_batches: int = 1,
    batch_size_fn: Callable[[list[Any]], float] | None = None,
) -> _Decorator: ...
def batch(
    _func: Callable[..., Any] | None = None,
    /,
    max_batch_size: int = 10,
    batch_wait_timeout_s: float = 0.01,
    max_concurrent_batches: int = 1,
    batch_size_fn: Callable[[list[Any]], float] | None = None,
) -> Any:
    """Run calls that come close together as one. Bare or with options; on methods and functions that are `async def`.

    The function gets a list for each parameter and returns a list, one item per call, in their order. Each caller gives
    one value and gets one. Calls are one batch when there are `max_batch_size` of them, or `batch_wait_timeout_s` after
    the first of them; while `max_concurrent_batches` run, what waits goes on filling up. With `batch_size_fn` the size of
    a batch is what that says of the list of its items (their first arguments), not their number; RuntimeError for an
    item that is larger than a batch.

    What the function raises, all callers of that batch get; MillstreamError if it does not return one item per call. A
    caller that is cancelled is left out of its batch, and once that runs, disturbs nobody: the batch runs to its end.
    Calls for different multiplexed models are different batches; `serve.get_multiplexed_model_id()` names the model.
    Otherwise a batch runs in a copy of the context of its first caller.

    An async generator function yields such lists. Its callers get async generators; StopIteration or StopAsyncIteration
    as an item ends that of one caller, whose place in later lists is ignored. It is closed when no caller listens anymore.

    The method has `set_max_batch_size` and `set_batch_wait_timeout_s`. Raises TypeError for anything but async functions
    and for settings of the wrong type, ValueError for settings out of range.
    """
    limits = Limits(_checked_size(max_batch_size), _checked_wait(batch_wait_timeout_s))
    if isinstance(max_concurrent_batches, bool) or not isinstance(max_concurrent_batches, int):
        raise TypeError(f"max_concurrent_batches={max_concurrent_batches!r} must be a whole number")
    if max_concurrent_batches < 1:
        raise ConfigError(f"max_concurrent_batches={max_concurrent_batches} must be at least 1")
    if batch_size_fn is not None and not callable(batch_size_fn):
        raise TypeError(f"batch_size_fn={batch_size_fn!r} must be a function of a list of items")

    def decorate(function: Callable[..., Any]) -> Batched[Any]:
        batching = Batching(_checked_function(function), limits, max_concurrent_batches, batch_size_fn)
        made: Batched[Any]
        made = BatchedGenerator(_items, batching, None) if batching.is_generator else Batched(_answer, batching, None)
        functools.update_wrapper(made, function)
        return made

    return decorate if _func is None else decorate(_func)


def _checked_function(function: Any) -> Callable[..., Any]:
    if not inspect.iscoroutinefunction(function) and not inspect.isasyncgenfunction(function):
        raise TypeError(f"@serve.batch takes an 'async def' function or method, not {function!r}")
    return function  # type: ignore[no-any-return]


def _checked_size(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"max_batch_size={value!r} must be a whole number")
    if value < 1:
        raise ConfigError(f"max_batch_size={value} must be at least 1")
    return value


def _checked_wait(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"batch_wait_timeout_s={value!r} must be a number of seconds")
    if not value >= 0:  # nor a nan
        raise ConfigError(f"batch_wait_timeout_s={value} must be at least 0")
    return value
