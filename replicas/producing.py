"""Runs what a streaming method returns, on the loop or in a thread, and hands its items to an Emitter."""

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any

from millstream.broker.pickling import Pickled
from millstream.replicas.streaming import Emitter

BREATH_S = 0.001  # a generator that never waits lets others run this often, and its items go out


class Producer:
    """One run of one streaming method. `started(job)` is told of a thread's job while a thread runs it, then of None."""

    def __init__(
        self, emitter: Emitter, threads: ThreadPoolExecutor, started: Callable[["Future[Any] | None"], None]
    ) -> None:
        self._emitter, self._threads, self._started = emitter, threads, started
        self._loop = asyncio.get_running_loop()

    async def run(self, call: Callable[[], Any], *, is_async: bool) -> int:
        """Send the items of what `call()` returns, or awaits if it `is_async`; their number.

        Raises what that raises, and TypeError if it makes no items. A generator is closed in any case.
        """
        if is_async or _makes_items(call):
            made = call()
            made = await made if inspect.isawaitable(made) else made
        else:
            made = await self._in_thread(call)
        if hasattr(made, "__aiter__"):
            await self._pump(made)
        elif hasattr(made, "__next__"):
            await self._in_thread(lambda: made)
        elif made is not _EXHAUSTED:
            raise TypeError(
                f"a stream was asked for, and the method returned {type(made).__name__}, not a generator; "
                "call it without stream=True, or have it yield its items"
            )
        return self._emitter.count

    async def _pump(self, generator: Any) -> None:
        emitter, breath_at = self._emitter, 0.0  # the first item goes out at once
        try:
            async for item in generator:
                envelope = emitter.seal(item)
                if isinstance(envelope, Pickled):
                    envelope = await emitter.write(envelope)
                emitter.add(envelope, self._loop.call_soon)
                if emitter.is_full:
                    await emitter.until_read()
                elif self._loop.time() >= breath_at:
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)  # what the first one has woken up comes after us; now it has had its turn
                    breath_at = self._loop.time() + BREATH_S
        finally:
            if hasattr(generator, "aclose"):
                await generator.aclose()

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        """Call in a thread, and send the items of the iterator that this returns; anything else is handed on."""
        job = self._threads.submit(copy_context().run, self._call_there, call)
        self._started(job)
        try:
            made = await asyncio.wrap_future(job)
        finally:
            if not job.done():  # the process ends: so does the thread, at its next item
                self._emitter.close()
        self._started(None)
        return made

    def _call_there(self, call: Callable[[], Any]) -> Any:
        try:
            made = call()
            return self._pump_there(made) if hasattr(made, "__next__") else made
        except StopIteration as e:  # no future takes one
            raise RuntimeError("the method raised StopIteration") from e

    def _pump_there(self, generator: Any) -> Any:
        emitter = self._emitter
        try:
            for item in generator:
                envelope = emitter.seal(item)
                if isinstance(envelope, Pickled):
                    envelope = self._on_loop(emitter.write(envelope))
                emitter.add(envelope, self._loop.call_soon_threadsafe)
                if emitter.is_full:
                    self._on_loop(emitter.until_read())
        finally:
            if hasattr(generator, "close"):
                generator.close()
        return _EXHAUSTED

    def _on_loop(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


_EXHAUSTED: Any = object()  # a thread has sent all items


def _makes_items(call: Callable[[], Any]) -> bool:
    """To call this makes an async generator and runs nothing yet: no thread is needed."""
    function = call.func if isinstance(call, partial) else call
    return inspect.isasyncgenfunction(function) or inspect.isasyncgenfunction(getattr(function, "__call__", None))  # noqa: B004
