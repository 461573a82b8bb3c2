"""What the tests of local mode serve. Importable, so that processes can serve it, too."""

import asyncio
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NoReturn

from millstream import DeploymentHandle, ObjectRef, SyncHandle, serve
from millstream.errors import TaskError


class Unpicklable(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


@serve.deployment
class Model:
    """A method of each kind."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts
        self.name = uuid.uuid4().hex
        self.unit = ""

    def reconfigure(self, config: dict[str, Any]) -> None:
        self.unit = config["unit"]

    async def __call__(self, x: Any = None) -> Any:
        return x

    async def suspending(self, x: Any) -> Any:
        await asyncio.sleep(0)
        return x

    def sync(self, x: Any) -> Any:
        return x

    def thread(self) -> str:
        return threading.current_thread().name

    async def kinds(self, *args: Any, **kwargs: Any) -> list[str]:
        return [type(value).__name__ for value in (*args, *kwargs.values())]

    async def append(self, values: list[Any]) -> list[Any]:
        values.append("appended")
        return values

    async def grow(self) -> tuple[str, int]:
        """One of its constructor arguments is a list: each replica has its own."""
        self.parts[0].append(self.name)
        return self.name, len(self.parts[0])

    async def strangers(self) -> list[str]:
        return [name for name in self.parts[0] if name != self.name]

    async def who(self) -> str:
        return self.name

    async def configured(self) -> str:
        return self.unit

    async def fails(self, text: str) -> NoReturn:
        raise KeyError(text)

    def fails_in_a_thread(self, text: str) -> NoReturn:
        raise ValueError(text)

    async def fails_unpicklably(self, text: str) -> NoReturn:
        raise Unpicklable(text)

    async def leaves(self) -> NoReturn:
        await asyncio.sleep(0)
        raise SystemExit(3)

    async def returns_a_lock(self) -> Any:
        return threading.Lock()


class NotHere:
    """Can be pickled, and not unpickled."""

    def __reduce__(self) -> Any:
        return _not_here, ()


def _not_here() -> NoReturn:
    raise RuntimeError("not here")


def load() -> str:
    return "the real one"


@serve.deployment
class Patched:
    def __call__(self) -> str:
        return load()


@serve.deployment
class Adder:
    def __init__(self, amount: int) -> None:
        self._amount = amount

    def __call__(self, x: int) -> int:
        return x + self._amount


@serve.deployment
class Pipeline:
    """Feeds un-awaited tasks from one into the next."""

    def __init__(self, first: DeploymentHandle, second: DeploymentHandle) -> None:
        self._first, self._second = first, second

    async def __call__(self, x: Any) -> Any:
        return await self._second.call(self._first.remote(x))

    def blocking(self, x: Any) -> Any:
        """With blocking handles, in a thread."""
        first, second = (SyncHandle(one.deployment_name, one.app_name) for one in (self._first, self._second))
        return second.call(first.call(x))

    async def forgiving(self, x: Any) -> str:
        try:
            return str(await self._second.call(self._first.remote(x)))
        except TaskError as e:
            return type(e).__mro__[0].__name__


@serve.deployment
class Counting:
    """How many requests were inside at once, at most."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = self._most = 0

    async def pause(self) -> None:
        self._enter()
        await asyncio.sleep(0.02)
        self._inside -= 1

    def pause_in_a_thread(self) -> None:
        self._enter()
        threading.Event().wait(0.02)
        with self._lock:
            self._inside -= 1

    def _enter(self) -> None:
        with self._lock:
            self._inside += 1
            self._most = max(self._most, self._inside)

    async def most(self) -> int:
        return self._most


@serve.deployment(sync_threads=2)
class Meeting:
    """Two requests that need each other."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2)

    def __call__(self) -> int:
        return self._barrier.wait(10)


@serve.deployment
class Holding:
    """Runs a request until another one lets it go."""

    def __init__(self) -> None:
        self._open, self._entered = asyncio.Event(), asyncio.Event()

    async def hold(self, x: Any = None) -> Any:
        self._entered.set()
        await self._open.wait()
        return x

    async def entered(self) -> None:
        await self._entered.wait()

    async def let_go_soon(self) -> None:
        asyncio.get_running_loop().call_later(0.2, self._open.set)


@serve.deployment
class Blocking:
    """Stops its own loop until a file is there. Not a thing to do."""

    async def __call__(self, path: str) -> str:
        while not os.path.exists(path):  # noqa: ASYNC240
            time.sleep(0.005)  # noqa: ASYNC251
        return "at last"


@serve.deployment
class Newer:
    """What is more than a request and its answer: streams, batches, and what code may know of where it runs."""

    async def count(self, to: int) -> AsyncIterator[int]:
        for n in range(to):
            yield n

    def count_in_a_thread(self, to: int) -> Iterator[int]:
        yield from range(to)

    @serve.batch(max_batch_size=3, batch_wait_timeout_s=10)
    async def together(self, xs: list[int]) -> list[list[int]]:
        return [xs] * len(xs)

    def where(self) -> tuple[str, str]:
        context = serve.get_replica_context()
        return context.deployment, context.replica_tag

    async def forever(self) -> None:
        await asyncio.Event().wait()

    def forever_in_a_thread(self, until: str) -> None:
        Path(f"{until}.began").touch()
        while not os.path.exists(until):
            time.sleep(0.005)


@serve.deployment
class Broken:
    def __init__(self, message: str) -> None:
        raise RuntimeError(message)


@serve.deployment
def double(x: int) -> int:
    return 2 * x


@serve.deployment
def failing(x: int) -> int:
    raise OSError(f"no {x}")


@serve.deployment
async def triple(x: int) -> int:
    return 3 * x


async def values_of(refs: list[ObjectRef]) -> list[Any]:
    return [await ref for ref in refs]
