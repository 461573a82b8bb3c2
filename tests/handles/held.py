"""Deployments whose requests run until the test lets them go, and what they have to tell."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from millstream import serve
from millstream.broker.states import State
from millstream.errors import RequestTimeoutError
from millstream.handles.handle import DeploymentHandle, SyncHandle
from millstream.handles.ref import ObjectRef
from tests.replica_helpers import Gate

TIMEOUT_S = 0.3
SLACK_S = 0.25  # a few tens of ms, and what other processes take of this machine


class Notes:
    """What the code of a test's deployments has to tell. One for all threads of the test."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.started: list[Any] = []
        self.cancelled: list[Any] = []
        self.ended: list[Any] = []
        self.most_at_once = 0
        self._at_once = 0

    async def hold(self, name: Any) -> Any:
        self.started.append(name)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        finally:
            self._at_once -= 1
            self.ended.append(name)
        return name


class Model:
    def __init__(self, notes: Notes | None = None) -> None:
        self._notes = notes or Notes()

    async def __call__(self, name: Any) -> Any:
        return await self._notes.hold(name)

    async def echo(self, x: Any) -> Any:
        return x

    async def take(self, *values: Any) -> Any:
        self._notes.started.append("take")
        return values

    async def stubborn(self, name: Any) -> Any:
        """Takes no notice of being cancelled."""
        self._notes.started.append(name)
        try:
            await self._notes.gate.wait()
        except asyncio.CancelledError:
            self._notes.cancelled.append(name)
            await self._notes.gate.wait()
        self._notes.ended.append(name)
        return name

    def told(self, name: Any) -> Any:
        """A sync method that looks whether it is cancelled."""
        self._notes.started.append(name)
        request = serve.get_request_context()
        if request.wait_cancelled(10):
            self._notes.cancelled.append((name, request.is_cancelled))
        self._notes.ended.append(name)
        return name

    def deaf(self, name: Any) -> Any:
        """A sync method that does not look."""
        self._notes.started.append(name)
        self._notes.gate.wait_in_thread()
        self._notes.ended.append(name)
        return name

    def whoami(self) -> str:
        return serve.get_request_context().ref_id


async def in_state(handle: DeploymentHandle, state: State, notes: Notes) -> ObjectRef:
    """A request of `Model` with one slot that is in this state."""
    if state is State.DELAYED:
        return await handle.options(delay_s=3600).remote("it")
    first = await handle.remote("first")
    match state:
        case State.RUNNING:
            return first
        case State.PARKED:
            return await handle.take.remote(first)
        case _:
            return await handle.options(block_until="queued").remote("it")


@contextmanager
def in_time(timeout_s: float = TIMEOUT_S, slack_s: float = SLACK_S) -> Iterator[Any]:
    """What is in it raises RequestTimeoutError at the deadline, and neither before nor long after it."""
    started = time.monotonic()
    with pytest.raises(RequestTimeoutError) as caught:
        yield caught
    assert timeout_s - 0.002 <= time.monotonic() - started < timeout_s + slack_s


def blocking(handle: DeploymentHandle) -> SyncHandle:
    """The same handle, for threads."""
    return SyncHandle(handle.deployment_name, handle.app_name, handle._options)
