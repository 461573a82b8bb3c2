"""What the user's class may have besides its methods: `reconfigure`, `check_health` and `__del__`, and how each is called.

An async one runs on the loop. A sync one runs in a thread of its own, neither on the loop nor in the threads of the
methods: however busy these are, it gets its turn.
"""

import asyncio
import contextvars
import inspect
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from millstream.broker.tracebacks import user_traceback
from millstream.errors import ConfigError

log = logging.getLogger("millstream.replica")


class Hooks:
    """The hooks of one object. Each raises what the user's code raises, a SystemExit included."""

    def __init__(self, instance: Any) -> None:
        self._instance = instance
        self._has_methods = not inspect.isroutine(instance)

    @property
    def has_check_health(self) -> bool:
        return self._find("check_health") is not None

    async def reconfigure(self, user_config: Any) -> None:
        """Raises ConfigError if there is no such method."""
        hook = self._find("reconfigure")
        if hook is None:
            name = type(self._instance).__name__ if self._has_methods else self._instance.__name__
            raise ConfigError(f"user_config is set, but {name} has no method reconfigure(user_config)")
        await call(hook, user_config)

    async def check_health(self) -> None:
        hook = self._find("check_health")
        if hook is not None:
            await call(hook)

    async def say_goodbye(self, who: str) -> None:
        """Call `__del__`, as Ray Serve does; what it raises is for the log only. `os._exit` follows: there is no second call."""
        hook = self._find("__del__")
        if hook is None:
            return
        try:
            await call(hook)
        except asyncio.CancelledError:
            log.warning("the __del__ of %s was still running at the deadline", who)
            raise
        except BaseException as e:
            log.error("the __del__ of %s raised %s: %s\n%s", who, type(e).__name__, e, user_traceback(e))

    def _find(self, name: str) -> Callable[..., Any] | None:
        # Asked of its class: a mock has every attribute, and a __getattr__ may have.
        if not self._has_methods or getattr(type(self._instance), name, None) is None:
            return None
        hook = getattr(self._instance, name)
        return hook if callable(hook) else None


async def call(hook: Callable[..., Any], *arguments: Any) -> None:
    """Run one hook to its end. Cancelling this leaves a thread to itself: nothing can stop it."""
    if inspect.iscoroutinefunction(hook):
        await hook(*arguments)
        return
    returned, error = await asyncio.wrap_future(_in_thread(hook, arguments))
    if error is not None:
        raise error
    if inspect.isawaitable(returned):
        await returned


def _in_thread(hook: Callable[..., Any], arguments: tuple[Any, ...]) -> "Future[tuple[Any, BaseException | None]]":
    """What it returned or raised: a StopIteration cannot travel through a future by itself."""
    future: Future[tuple[Any, BaseException | None]] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result((context.run(hook, *arguments), None))
        except BaseException as e:
            future.set_result((None, e))

    # A daemon: one that never returns does not hold up the end of the process.
    threading.Thread(target=run, name=f"millstream-{hook.__name__}", daemon=True).start()
    return future
