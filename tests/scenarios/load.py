"""Callers that do not stop: threads with blocking handles, loops with asynchronous ones, each with calls and refs."""

import asyncio
import itertools
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import millstream
from millstream import serve
from millstream.handles.handle import DeploymentHandle, SyncHandle

PATIENCE_S = 30.0


class Load:
    """What callers have got so far."""

    def __init__(self, deployment: str) -> None:
        self._deployment = deployment
        self._numbers = itertools.count()
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self.answers: list[Any] = []
        self.errors: list[str] = []

    def stop(self) -> None:
        self._is_over.set()

    def so_far(self) -> int:
        return len(self.answers)

    def _keep(self, answers: list[Any]) -> None:
        with self._lock:
            self.answers += answers

    def call_from_a_thread(self) -> None:
        handle = serve.get_deployment_handle(self._deployment, sync=True)
        while not self._is_over.is_set():
            with self._errors_kept():
                self._keep([self._call(handle), *self._refs(handle)])

    def _call(self, handle: SyncHandle) -> Any:
        return handle.call(next(self._numbers))

    def _refs(self, handle: SyncHandle) -> list[Any]:
        refs = [handle.options(block_until="queued").remote(next(self._numbers)) for _ in range(5)]
        return list(millstream.get(refs, timeout=PATIENCE_S))

    def call_from_a_loop(self) -> None:
        asyncio.run(self._call_on_a_loop())

    async def _call_on_a_loop(self) -> None:
        handle = serve.get_deployment_handle(self._deployment)
        await asyncio.gather(*[self._call_in_turn(handle) for _ in range(4)])

    async def _call_in_turn(self, handle: DeploymentHandle) -> None:
        while not self._is_over.is_set():
            with self._errors_kept():
                async with asyncio.timeout(PATIENCE_S):
                    answer = await handle.call(next(self._numbers))
                    ref = await handle.remote(next(self._numbers))
                    self._keep([answer, await ref])

    @contextmanager
    def _errors_kept(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.errors.append(traceback.format_exc())
            self.stop()


@contextmanager
def under_load(deployment: str, *, threads: int = 2, loops: int = 2) -> Iterator[Load]:
    """Within the block there is load; it must end without an error."""
    load = Load(deployment)
    targets = [load.call_from_a_thread] * threads + [load.call_from_a_loop] * loops
    callers = [threading.Thread(target=target, name="caller", daemon=True) for target in targets]
    for caller in callers:
        caller.start()
    try:
        yield load
    finally:
        load.stop()
        for caller in callers:
            caller.join(PATIENCE_S)
    assert load.errors == [], load.errors[0]
    assert not any(caller.is_alive() for caller in callers), "a caller hangs"
