"""The application that the documentation is compared with: something of everything that can lie in Redis."""

import asyncio
import os

from millstream import serve
from millstream.handles.handle import DeploymentHandle


@serve.deployment(max_ongoing_requests=1)
class Gate:
    """Runs until a file is there; one request at a time, so a second one stays queued."""

    async def __call__(self, path: str) -> str:
        while not os.path.exists(path):  # noqa: ASYNC240, ASYNC110 - a test's replica, and the file is local
            await asyncio.sleep(0.01)
        return "open"


@serve.deployment(max_attempts=1)
class Crash:
    """Takes its process along: what it is asked for becomes a dead letter."""

    async def __call__(self) -> None:
        os._exit(1)


@serve.deployment
class Echo:
    async def __call__(self, value: object) -> object:
        return value


@serve.deployment
class Front:
    def __init__(self, gate: DeploymentHandle, crash: DeploymentHandle, echo: DeploymentHandle) -> None:
        self._handles = gate, crash, echo

    async def __call__(self) -> int:
        return len(self._handles)


app = Front.bind(Gate.bind(), Crash.bind(), Echo.bind())
