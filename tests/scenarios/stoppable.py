"""Applications whose requests are cancelled: they leave a line for each start, and for each time they were told."""

import asyncio
import os
import time
from pathlib import Path

from millstream import serve
from millstream.handles.handle import DeploymentHandle, SyncHandle


@serve.deployment
class Stoppable:
    def __init__(self, ledger: str) -> None:
        self._ledger = ledger

    async def pid(self) -> int:
        return os.getpid()

    async def hold(self, name: str, until: str) -> tuple[str, int]:
        """Run until a file exists."""
        self._note("started", name)
        try:
            while not os.path.exists(until):  # noqa: ASYNC110, ASYNC240 - what it waits for is another process
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self._note("cancelled", name)
            raise
        return name, os.getpid()

    def block(self, name: str, until: str) -> tuple[str, int]:
        """As `hold`, in a thread that looks at nothing else."""
        self._note("started", name)
        while not Path(until).exists():
            time.sleep(0.005)
        return name, os.getpid()

    async def block_the_loop(self, name: str, until: str) -> tuple[str, int]:
        """As `block`, on the loop."""
        return self.block(name, until)

    def _note(self, what: str, name: str) -> None:
        with open(self._ledger, "a") as file:
            file.write(f"{what} {name} {os.getpid()}\n")


@serve.deployment
class Caller:
    """Has another deployment do the work, on the loop or from a thread."""

    def __init__(self, worker: DeploymentHandle) -> None:
        self._worker = worker

    async def on_the_loop(self, name: str, until: str) -> object:
        return await self._worker.hold.call(name, until)

    def in_a_thread(self, name: str, until: str) -> object:
        return SyncHandle(self._worker.deployment_name, self._worker.app_name).hold.call(name, until)
