"""The node's side of a replica on a thread of this process: local mode. `process.py` is for those that are processes.

The thread has a loop of its own, so user code that blocks one replica blocks no other, and never the caller.
"""

import asyncio
import concurrent.futures.thread
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from millstream.broker.codec import codec_for
from millstream.broker.definitions import Definition, reopen
from millstream.broker.tracebacks import user_traceback
from millstream.config import DeploymentConfig, Settings
from millstream.handles.engines import new_loop
from millstream.replicas.replica import Birth, Replica

PREFIX = "millstream-"  # of the names of all our threads


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the replicas of a deployment are made of: the callable in memory, and the sealed definition with the arguments."""

    target: Any
    envelope: bytes
    config: DeploymentConfig

    @property
    def replicas(self) -> int:
        """As many as there are at first elsewhere, and at least one where the number is scaled: nobody scales here."""
        scaling = self.config.autoscaling
        if scaling is None:
            return self.config.num_replicas
        first = scaling.min_replicas if scaling.initial_replicas is None else scaling.initial_replicas
        return max(1, first)

    def open(self, settings: Settings, tag: str) -> Definition:
        """With arguments of its own for each replica, as processes have them."""
        return reopen(codec_for(settings.secret_key, settings.namespace, tag), self.envelope, self.target)


class ReplicaThread:
    """One replica, as its node sees it. `changed` is called, in its thread, when it has something to say or has ended."""

    def __init__(self, settings: Settings, birth: Birth, recipe: Recipe, changed: Callable[[], None]) -> None:
        self.birth = birth
        self.is_ready = False
        self.is_draining = False
        self.is_claiming = True
        self.failure: tuple[str, str] | None = None  # message, traceback: its constructor raised
        self.end = ""  # how it ended; empty until then
        self.cut_at: float | None = None
        self._is_cut = False
        self._settings, self._recipe, self._changed = settings, recipe, changed
        self._loop = new_loop()
        self._replica: Replica | None = None
        self._life: asyncio.Task[Any] | None = None
        # A daemon, and so are the threads that it starts: user code that never returns must not hold up the exit.
        self._thread = threading.Thread(target=self._live, name=f"{PREFIX}{birth.tag}-{birth.replica}", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return self.birth.replica

    def drain(self) -> None:
        """Have it finish what it runs, and end."""
        self.is_draining = True
        self._call(lambda: self._replica.stop() if self._replica is not None else None)

    def cut(self) -> None:
        """End it as a kill would, as far as user code lets us: what it runs is cancelled, its connections close."""
        if not self._is_cut:
            self._is_cut = True
            self._call(lambda: self._life.cancel() if self._life is not None else None)

    def leave_behind(self) -> None:
        """It counts as ended; its thread may live on."""
        self.end, self.is_claiming = "did not end", False

    # what the replica has instead of a launcher

    async def send(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            self.is_ready = True
        elif "draining" in message:
            self.is_claiming = False
        elif "recycling" in message:
            self.is_draining = True  # by its own decision: another takes its place at once
        elif "failed" in message:
            self.failure = (message["failed"], message["traceback"])
        else:
            return  # that it is well
        self._changed()

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """There are none, for as long as it lives: `drain` calls it."""
        yield await asyncio.get_running_loop().create_future()

    # its thread

    def _live(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._be_a_replica())
            end = "exited"
        except asyncio.CancelledError:
            end = "was cut off"
        except BaseException as e:
            end = f"raised {type(e).__name__}: {e}"
        self.is_claiming = False
        self.end = end
        self._changed()

    async def _be_a_replica(self) -> None:
        if self._is_cut:
            return
        self._life = asyncio.current_task()
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(thread_name_prefix=f"{PREFIX}to-thread"))
        try:
            definition = self._recipe.open(self._settings, self.birth.tag)
        except Exception as e:
            message = f"unpickling its arguments raised {type(e).__name__}: {e}"
            await self.send({"failed": message, "traceback": user_traceback(e)})
            return
        self._replica = Replica(self._settings, self.birth, definition, self)
        if self.is_draining:
            self._replica.stop()
        await self._replica.run()

    def _call(self, function: Callable[[], Any]) -> None:
        with contextlib.suppress(RuntimeError):  # its loop is closed: it has ended
            self._loop.call_soon_threadsafe(function)


def let_go_of_threads() -> None:
    """Have Python not wait at its exit for threads in which replicas still run user code.

    It waits for the threads of all executors, daemons included, before it calls what is registered with atexit.
    """
    waited_for: Any = concurrent.futures.thread._threads_queues
    for thread in [thread for thread in list(waited_for) if thread.name.startswith(PREFIX)]:
        waited_for.pop(thread, None)
