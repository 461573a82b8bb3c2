"""From a definition to something that can be called: the user's object, its methods, and how each of them runs."""

import dis
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from types import FunctionType
from typing import Any

from millstream.broker.definitions import Definition, has_async_methods, max_ongoing
from millstream.config import DeploymentConfig
from millstream.errors import MethodNotFoundError
from millstream.replicas.context import constructed
from millstream.replicas.hooks import Hooks

# Opcodes at which a coroutine may give up control, over the Python versions we support.
_SUSPENDING = {"GET_AWAITABLE", "GET_ANEXT", "GET_AITER", "BEFORE_ASYNC_WITH", "SEND", "YIELD_VALUE"}


@dataclass(frozen=True, slots=True)
class Method:
    """One callable method: `is_async` runs on the loop, else in a thread; `is_prompt` cannot even suspend; `is_generator`
    yields items."""

    function: Callable[..., Any]
    is_async: bool
    is_prompt: bool
    is_generator: bool = False


class Served:
    """The user's object in this replica."""

    def __init__(self, instance: Any, name: str) -> None:
        self.instance, self._name = instance, name
        self.hooks = Hooks(instance)
        self._methods: dict[bytes, Method] = {}

    def method(self, name: bytes) -> Method:
        """Look a method up, once. Raises MethodNotFoundError naming those there are."""
        found = self._methods.get(name)
        if found is None:
            found = self._methods[name] = self._bind(name.decode())
        return found

    def _bind(self, name: str) -> Method:
        function: Any
        if name == "__call__" and (_is_function(self.instance) or inspect.iscoroutinefunction(self.instance)):
            function = self.instance  # an object that is no function may be marked as one, too: an AsyncMock is
        else:
            function = getattr(self.instance, name, None)
            if not callable(function) or (name.startswith("__") and name != "__call__"):
                raise MethodNotFoundError(
                    f"{self._name} has no method {name!r}; available methods: {', '.join(self.public_methods()) or 'none'}",
                    method=name,
                )
        body = function if _is_function(function) else type(function).__call__
        is_async = inspect.iscoroutinefunction(body) or inspect.iscoroutinefunction(function)  # marked as one
        is_generator = inspect.isgeneratorfunction(body) or inspect.isasyncgenfunction(body)
        return Method(function, is_async, _is_prompt(body), is_generator)

    def public_methods(self) -> list[str]:
        if _is_function(self.instance):
            return ["__call__"]
        names = [n for n in dir(self.instance) if n == "__call__" or not n.startswith("__")]
        return [n for n in names if not self._is_property(n) and callable(getattr(self.instance, n, None))]

    def _is_property(self, name: str) -> bool:
        """To look at one would run the user's code."""
        return isinstance(inspect.getattr_static(self.instance, name, None), property | cached_property)

    def max_ongoing(self, config: DeploymentConfig) -> int:
        """How many requests may run here at once."""
        return max_ongoing(self._target, config)

    def may_take_ahead(self, config: DeploymentConfig) -> bool:
        """May requests be taken before they can run? Where each waits for a thread, and would not run at once."""
        return self.max_ongoing(config) == config.sync_threads and not has_async_methods(self._target)

    @property
    def _target(self) -> Any:
        return self.instance if _is_function(self.instance) else type(self.instance)


def _is_function(found: Any) -> bool:
    """A function or method. What `serve.batch` makes of one is a partial, which is no routine to Python 3.13."""
    return inspect.isroutine(found) or isinstance(found, partial)


def _is_prompt(function: Any) -> bool:
    """Can this coroutine function never suspend? Then it may run without a task of its own.

    Decided by its code, not by trying: what suspends needs its own task from its first instruction on
    (asyncio.timeout and anyio's cancel scopes remember the task they were entered in).
    """
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType) or not inspect.iscoroutinefunction(function):
        return False
    return not any(i.opname in _SUSPENDING for i in dis.get_instructions(function))


async def build(definition: Definition, name: str) -> Served:
    """Construct the user's object. Raises whatever the user's code does."""
    target = definition.target
    if not inspect.isclass(target):
        constructed(target)
        return Served(target, name)
    if inspect.iscoroutinefunction(target.__init__):  # Ray Serve's way to await while loading
        instance = target.__new__(target)
        await target.__init__(instance, *definition.args, **definition.kwargs)
    else:
        instance = target(*definition.args, **definition.kwargs)
    constructed(instance)
    return Served(instance, name)
