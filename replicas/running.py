"""An attempt under way: what is known of it, and how its method is called in a task or in a thread."""

import asyncio
from typing import Any, NamedTuple

from millstream.handles.context import Request
from millstream.replicas.attempt import Attempt


class Running:
    """An attempt that has not ended at once."""

    __slots__ = ("attempt", "future", "has_begun", "is_taken", "job", "request", "since", "timer")

    def __init__(self, attempt: Attempt, request: Request, since: float) -> None:
        self.attempt, self.request, self.since = attempt, request, since
        self.future: asyncio.Future[Any] | None = None
        self.job: Any = None  # of the thread that runs it, if one does
        self.timer: asyncio.TimerHandle | None = None  # of its deadline
        self.has_begun = True  # its code: what it raises is its own
        self.is_taken = False  # cancelled, timed out or given to another replica: its outcome is nobody's


class Raised(NamedTuple):
    """What a method raised: a StopIteration cannot travel through a future, and a SystemExit in a task ends the loop."""

    error: BaseException


async def await_it(function: Any, args: Any, kwargs: Any) -> Any:
    """In a task."""
    try:
        return await function(*args, **kwargs)
    except (SystemExit, KeyboardInterrupt) as e:
        return Raised(e)


def call_it(function: Any, args: Any, kwargs: Any) -> Any:
    """In a thread."""
    try:
        return function(*args, **kwargs)
    except BaseException as e:
        return Raised(e)


class InThread(asyncio.Future[Any]):
    """The loop's view of a call in a thread."""

    def __init__(self, job: Any, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.job = job
        job.add_done_callback(lambda _: loop.call_soon_threadsafe(self._copy))

    def _copy(self) -> None:
        if not self.done() and not self.job.cancelled():
            self.set_result(self.job.result())
