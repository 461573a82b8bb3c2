"""Which engine serves whom: one per event loop, and one on a thread of its own for all synchronous code.

Also the process-wide settings that `millstream.init` makes, and what happens at fork and at interpreter exit.
"""

import asyncio
import atexit
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from millstream.config import Settings, find_settings
from millstream.handles.engine import Engine

T = TypeVar("T")

_lock = threading.RLock()
_settings: Settings | None = None
_by_loop: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Engine]" = weakref.WeakKeyDictionary()
_background: "Background | None" = None
_warned: set[str] = set()
_is_exit = False  # the interpreter ends


def use(settings: Settings) -> None:
    """Make these the settings of the process. Engines of other settings are closed."""
    global _settings
    with _lock:
        if _settings is not None and _settings != settings:
            close_all()
        _settings = settings


def settings() -> Settings:
    """The settings in use; found as `find_settings` does at first. Raises BrokerUnavailableError, ConfigError."""
    global _settings
    with _lock:
        if _settings is None:
            _settings = find_settings()
        return _settings


def is_initialized() -> bool:
    return _settings is not None


def settings_for_child() -> Settings | None:
    """What a handle or ref tells a process that multiprocessing is spawning with it as an argument; else None.

    They are pickled into a pipe to a child of this very process then, which may know all that we know (multiprocessing
    hands its own key over in the same way). Everywhere else they pickle without URL and secret.
    """
    context = sys.modules.get("multiprocessing.context")
    return _settings if context is not None and context.get_spawning_popen() is not None else None


def made_in_child(settings: Settings, cls: Callable[..., T], *arguments: Any) -> T:
    """The other end of `settings_for_child`. Settings that the child has already are kept."""
    global _settings
    with _lock:
        _settings = _settings or settings
    return cls(*arguments)


def current() -> Engine:
    """The engine of the running loop. RuntimeError without one."""
    loop = loop_here("this")
    engine = _by_loop.get(loop)
    if engine is None or engine.is_closed:
        engine = Engine(settings())
        with _lock:  # loops of several threads may be here, and another one in `close_all`
            _by_loop[loop] = engine
    return engine


def background() -> "Background":
    """The engine of all synchronous code, on a thread of its own; started at first use."""
    global _background
    with _lock:
        if _background is None:
            _background = Background(settings())
        return _background


def is_background(engine: Engine | None) -> bool:
    """Is this the engine of all synchronous code, and in use?"""
    return engine is not None and _background is not None and _background.engine is engine and not engine.is_closed


class Background:
    """A thread with a loop and an engine."""

    loop: asyncio.AbstractEventLoop
    engine: Engine
    _is_exit = False

    def __init__(self, settings: Settings) -> None:
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._live, args=(settings, started), name="millstream-engine", daemon=True
        )
        self._thread.start()
        started.wait()

    def _live(self, settings: Settings, started: threading.Event) -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(self._until_closed(settings, started))

    async def _until_closed(self, settings: Settings, started: threading.Event) -> None:
        self.loop, self._is_closed = asyncio.get_running_loop(), asyncio.Event()
        self.engine = Engine(settings)
        started.set()
        await self._is_closed.wait()
        self.engine.close(tell_who_waits=not self._is_exit)
        await self.engine.lines.until_ended()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine there and block for its result."""
        return run_on(self.loop, coroutine, timeout)

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have a function called there, soon."""
        self.loop.call_soon_threadsafe(function, *arguments)

    def close(self, *, at_exit: bool = False) -> None:
        """End the thread in order. From any other thread, one that runs a loop of its own included."""
        self._is_exit = at_exit
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._is_closed.set)
            self._thread.join(timeout=2.0)


def run_on(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
    """Run a coroutine on the loop of another thread and block for its result."""
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        return future.result(timeout)
    except BaseException:
        future.cancel()
        raise


def new_loop() -> asyncio.AbstractEventLoop:
    """A loop for a thread of ours: uvloop's where it is installed, as in a replica's process."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def close_all() -> None:
    """Close every engine and forget the settings. Handles stay usable: the next call connects anew."""
    global _background, _settings
    with _lock:
        background, _background, _settings = _background, None, None
        engines = list(_by_loop.items())
        _by_loop.clear()
    for loop, engine in engines:
        if loop.is_closed():
            continue
        if loop is running_loop():
            engine.close()
        else:
            loop.call_soon_threadsafe(engine.close)
    if background is not None:
        background.close()


def stay_behind_at_exit() -> None:
    """At the interpreter's exit: hold a daemon thread, which ends here with the process. Else nothing."""
    if _is_exit and threading.current_thread().daemon:
        threading.Event().wait()


def warn_if_on_a_loop(what: str, instead: str, depth: int = 3) -> None:
    """Say once per place that a blocking call on a running loop stops that loop, and what to write instead.

    The warning is that of the line which is so many calls above.
    """
    if running_loop() is not None and what not in _warned:
        _warned.add(what)
        warnings.warn(
            f"{what} blocks the running event loop until it returns; write {instead}", RuntimeWarning, stacklevel=depth
        )


def loop_here(what: str) -> asyncio.AbstractEventLoop:
    """The loop this thread is running. RuntimeError, which says what to do, for `what` cannot do without."""
    loop = running_loop()
    if loop is None:
        raise RuntimeError(
            f"no asyncio event loop runs in this thread, and {what} needs one (trio has none: anyio runs with its asyncio "
            "backend); use a SyncHandle and ref.result() here, in a thread if another kind of loop must not be blocked"
        )
    return loop


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop this thread is running, if it is."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _forget_in_child() -> None:
    """After a fork: sockets and threads belong to the parent. The child's first call makes its own."""
    global _background, _by_loop, _lock
    _lock = threading.RLock()
    for engine in [*_by_loop.values(), *([_background.engine] if _background is not None else [])]:
        engine.is_closed = True  # refs made before the fork must not wait for it
    _background = None
    _by_loop = weakref.WeakKeyDictionary()


def _close_at_exit() -> None:
    """Whoever still waits is a daemon thread, and ends with the process: an error there would only be printed."""
    global _background, _is_exit
    _is_exit = True
    background, _background = _background, None  # who calls after this gets another one, if Python still starts threads
    if background is not None:
        background.close(at_exit=True)


os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_close_at_exit)
