"""The applications that the scenarios run. Importable, as an application usually is."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

from millstream import serve
from millstream.handles.handle import DeploymentHandle
from millstream.handles.ref import ObjectRef
from millstream.replicas.finisher import Finisher


@serve.deployment
class Worker:
    """Does as it is told, and leaves a line in a file for each start: the ledger of attempts."""

    def __init__(self, ledger: str = "") -> None:
        self._ledger = ledger

    async def echo(self, value: object) -> object:
        return value

    async def pid(self) -> int:
        return os.getpid()

    async def hold(self, name: str, until: str) -> tuple[str, int]:
        """Run until a file exists."""
        self._note(name)
        while not os.path.exists(until):  # noqa: ASYNC110, ASYNC240 - what it waits for is another process
            await asyncio.sleep(0.005)
        return name, os.getpid()

    def block(self, name: str, until: str) -> tuple[str, int]:
        """As `hold`, without ever yielding the loop or thread."""
        self._note(name)
        while not Path(until).exists():
            time.sleep(0.005)
        return name, os.getpid()

    async def grow(self, name: str, until: str, size_bytes: int) -> bytes:
        """As `hold`, with a result of that size."""
        await self.hold(name, until)
        return b"x" * size_bytes

    async def count(self, name: str, until: str, *sizes_bytes: int) -> AsyncIterator[bytes]:
        """As `hold`, with items of these sizes."""
        await self.hold(name, until)
        for size_bytes in sizes_bytes:
            yield b"x" * size_bytes

    async def note(self, name: str, *values: object) -> object:
        """Leave a line, and return what was given."""
        self._note(name)
        return values

    async def await_inside(self, name: str, refs: list[ObjectRef]) -> object:
        """As `note`, for refs that it reads itself."""
        self._note(name)
        return [await ref for ref in refs]

    async def speak(self, text: str) -> None:
        print(text)
        print(text.upper(), file=sys.stderr)

    def _note(self, name: str) -> None:
        with open(self._ledger, "a") as file:
            file.write(f"{name} {os.getpid()}\n")


@serve.deployment
class DiesBeforeItSupplies:
    """Its replica is killed when the server has its result, and nobody has told those who wait for it."""

    async def hold(self, value: object, until: str) -> object:
        while not os.path.exists(until):  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.005)
        Finisher._supply = _die  # type: ignore[method-assign, assignment]
        return value

    async def pid(self) -> int:
        return os.getpid()


async def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@serve.deployment
class Broken:
    def __init__(self, message: str) -> None:
        raise RuntimeError(message)

    def __call__(self) -> None:
        """Never called."""


@serve.deployment
class Dying:
    def __init__(self) -> None:
        os.abort()


@serve.deployment
class Adder:
    def __init__(self, amount: int) -> None:
        self._amount = amount

    def __call__(self, x: int) -> int:
        return x + self._amount


@serve.deployment
class Pipeline:
    """Feeds un-awaited tasks from one adder into the next."""

    def __init__(self, first: DeploymentHandle, second: DeploymentHandle) -> None:
        self._first, self._second = first, second

    async def __call__(self, x: int) -> object:
        return await (await self._second.remote(self._first.remote(x)))


@serve.deployment
class Threaded:
    """An application that may not be forked: it starts a thread when it is imported by value."""

    async def pid(self) -> int:
        return os.getpid()
