"""A deployment whose queue is full, and the ways to send a request there."""

from typing import Any

import anyio.to_thread

from millstream.broker import control_scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.handles.handle import DeploymentHandle
from tests.handles.held import Model, Notes, blocking
from tests.replica_helpers import Serving

LIMIT = 5


async def waiting(redis: Control, keys: DeploymentKeys) -> int:
    return (await run(redis, control_scripts.backlog(keys))).waiting


async def full(serving: Serving, notes: Notes) -> DeploymentHandle:
    """A deployment with one request that runs and LIMIT that wait."""
    handle = serving(Model, notes, max_ongoing_requests=1, max_queued_requests=LIMIT)
    await handle.remote("first")
    for x in range(LIMIT):
        await handle.options(block_until="queued").remote(x)
    return handle


def patient(handle: DeploymentHandle) -> DeploymentHandle:
    return handle.options(when_full="wait")


async def value_of(handle: DeploymentHandle, how: str, argument: Any = "it") -> Any:
    """The value of a request made in one of the ways."""
    match how:
        case "call":
            return await handle.call(argument)
        case "remote":
            return await (await handle.remote(argument))
        case "queued":
            return await (await handle.options(block_until="queued").remote(argument))
        case "sync call":
            return await anyio.to_thread.run_sync(blocking(handle).call, argument)
        case "sync remote":
            return await anyio.to_thread.run_sync(lambda: blocking(handle).remote(argument).result())
        case "large":
            return len(await handle.call(b"x" * 1_000_000))
        case "with a key":
            return await handle.options(idempotency_key="k").call(argument)
        case "timed":
            return await handle.options(timeout_s=30).call(argument)
        case _:
            return await anext(handle.map([argument]))
