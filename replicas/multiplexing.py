"""`serve.multiplexed`: several models share one replica; each is loaded when it is asked for, and the oldest ones go."""

import asyncio
import contextlib
import functools
import inspect
import logging
import types
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, overload

from millstream.errors import ConfigError
from millstream.handles.context import Request, current
from millstream.replicas.belongings import keep_with

UNLIMITED = -1
log = logging.getLogger("millstream.replica")

_Loader = Callable[..., Coroutine[Any, Any, Any]]
F = TypeVar("F", bound=_Loader)


def get_multiplexed_model_id() -> str:
    """The model that the running request asks for, as its caller's `options(multiplexed_model_id=)` named it.

    "" if it named none, and outside of a request.
    """
    request = current.get()
    return "" if request is None else request.model_id


@overload
def multiplexed(func: F, /) -> F: ...
@overload
def multiplexed(func: None = None, /, max_num_models_per_replica: int = 3) -> Callable[[F], F]: ...
def multiplexed(func: _Loader | None = None, /, max_num_models_per_replica: int = 3) -> Any:
    """Keep the models that an async loader returns, so many per replica (-1: all of them). Bare or with the option.

    The loader is a method `(self, model_id)` or a function `(model_id)`. Awaiting it gives the model of that id: the one
    in memory, or else a new one, for which the model that was not used for the longest time makes room first. One model
    is loaded at a time, and once for all requests that wait for it. What the loader raises, all of these get, and the
    next request tries again. A request that is cancelled meanwhile does not end the loading.

    A model that goes has its `__del__` called, if its class has one: awaited if that is async, else in a thread; once,
    also when requests still use the model. What it raises is logged.

    Calling it raises TypeError unless it is given one string, and ValueError for an empty one. The decorator raises
    TypeError for anything but such a function and such a number, ValueError for a number out of range.
    """
    limit = max_num_models_per_replica
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"max_num_models_per_replica={limit!r} must be a whole number")
    if limit != UNLIMITED and limit < 1:
        raise ConfigError(f"max_num_models_per_replica={limit} must be at least 1, or {UNLIMITED} for no limit")

    def decorate(loader: _Loader) -> _Loader:
        is_method = _count_parameters(loader) == 2

        @functools.wraps(loader)
        async def load(*args: Any) -> Any:
            if len(args) != 1 + is_method:
                raise TypeError(
                    f"{loader.__qualname__} takes one argument, the id of a model; got {len(args) - is_method}"
                )
            owner = args[0] if is_method else load
            return await _models(owner, loader, limit).get(_checked_id(args[-1]), lambda: loader(*args))

        return load

    return decorate if func is None else decorate(func)


def _count_parameters(loader: Any) -> int:
    if not inspect.iscoroutinefunction(loader):
        raise TypeError(f"@serve.multiplexed takes an 'async def' function or method, not {loader!r}")
    count = len(inspect.signature(loader).parameters)
    if count not in (1, 2):
        raise TypeError(
            f"@serve.multiplexed takes a method (self, model_id) or a function (model_id); {loader.__qualname__} has "
            f"{count} parameters"
        )
    return count


def _checked_id(model_id: Any) -> str:
    if not isinstance(model_id, str):
        raise TypeError(f"the id of a model must be a string, not {type(model_id).__name__}")
    if not model_id:
        raise ValueError(
            "the id of a model cannot be empty: the request named none; send it with "
            "handle.options(multiplexed_model_id=...)"
        )
    return model_id


class _PerLoop:
    """The models of one loader for one object. By loop, because who waits for a model waits on a loop."""

    def __init__(self) -> None:
        self._models: dict[asyncio.AbstractEventLoop, _Models] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _PerLoop, ()  # a copy of the object starts without models

    def of_this_loop(self, limit: int) -> "_Models":
        loop = asyncio.get_running_loop()
        found = self._models.get(loop)
        if found is None:
            self._models = {loop: models for loop, models in self._models.items() if not loop.is_closed()}
            found = self._models[loop] = _Models(limit)
        return found


def _models(owner: Any, loader: Any, limit: int) -> "_Models":
    kept: _PerLoop = keep_with(owner).setdefault(loader.__qualname__, _PerLoop())
    return kept.of_this_loop(limit)


class _Models:
    """Loaded models, the one used longest ago first, and those that are being loaded."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._loaded: dict[str, Any] = {}
        self._loading: dict[str, asyncio.Task[Any]] = {}
        self._turn = asyncio.Lock()

    async def get(self, model_id: str, load: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        if model_id in self._loaded:
            model = self._loaded[model_id] = self._loaded.pop(model_id)
            return model
        loading = self._loading.get(model_id)
        if loading is None or loading.done():
            loading = self._loading[model_id] = asyncio.create_task(self._load(model_id, load))
        return await asyncio.shield(loading)  # others may wait for it, too

    async def _load(self, model_id: str, load: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        current.set(Request("", b"", model_id))  # not the request that happened to be first: that may be cancelled
        try:
            # One at a time, as in Ray: a model that is being loaded takes its memory before it is counted.
            async with self._turn:
                while 0 < self._limit <= len(self._loaded):
                    oldest = next(iter(self._loaded))
                    await _unload(oldest, self._loaded.pop(oldest))
                model = self._loaded[model_id] = await load()
                return model
        finally:
            del self._loading[model_id]


async def _unload(model_id: str, model: Any) -> None:
    """Call a model's `__del__`, and see to it that Python does not do so again."""
    if not hasattr(type(model), "__del__"):
        return
    try:
        if inspect.iscoroutinefunction(model.__del__):
            await model.__del__()
        else:
            await asyncio.to_thread(model.__del__)
    except Exception:
        log.exception("the __del__ of model %r raised; the model is gone all the same", model_id)
    finally:
        _disarm(model)


def _disarm(model: Any) -> None:
    """Python looks `__del__` up in the class, so the model gets one where it does nothing."""
    cls = type(model)
    body = {"__del__": lambda _: None, "__slots__": (), "__module__": cls.__module__, "__doc__": cls.__doc__}
    with contextlib.suppress(Exception):  # a class that cannot be derived from: its `__del__` runs once more
        model.__class__ = types.new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(body))
