"""What is served under chaos: methods that leave a line in the ledger for each attempt, and say whose value it was."""

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from chaos.ledger import Ledger
from millstream import serve
from millstream.handles.handle import DeploymentHandle
from millstream.replicas.finisher import FIELDS, Finisher

LEDGER = "CHAOS_LEDGER"  # environment: the ledger of replicas
RAISED = "CHAOS_RAISED"  # environment: a folder with a file for each attempt that has raised
HEALTH_TIMEOUT_S = 4.0
ITEMS = 20  # of a stream

Value = tuple[str, str]  # request, token of the attempt
_numbers = itertools.count()


class NotYet(Exception):
    """To be tried again."""


class Attempts:
    """What both deployments do: note the start and the end of each attempt."""

    def __init__(self) -> None:
        self._ledger = Ledger(os.environ[LEDGER])
        self._raised = Path(os.environ[RAISED])
        _note_what_is_accepted(self._ledger)
        self._replica = serve.get_replica_context().replica_tag
        self._ledger.note("up", self._replica, os.getpid())

    def begin(self, name: str) -> str:
        token = f"{self._replica}.{next(_numbers)}"
        self._ledger.note("start", name, os.getpid(), token)
        return token

    def end(self, name: str, token: str) -> Value:
        self._ledger.note("done", name, os.getpid(), token)
        return name, token

    def fail(self, name: str, token: str, times: int) -> None:
        """Raise, unless that has happened so many times."""
        for n in range(times):
            path = self._raised / f"{name}.{n}"
            if not path.exists():
                self._ledger.note("raised", name, os.getpid(), token)
                path.touch()
                raise NotYet(name)


@serve.deployment(
    num_replicas=4,
    result_ttl_s=7200,  # until the judge has read it
    max_attempts=100,  # nothing of this ends as a dead letter
    max_ongoing_requests=200,  # more than all clients send at a time: what is returned finds a free slot
    health_check_timeout_s=HEALTH_TIMEOUT_S,
    retry=serve.Retry(5, on=NotYet, backoff_s=0.02),
)
class Work(Attempts):
    def __init__(self, threads: DeploymentHandle) -> None:
        super().__init__()
        self.threads = threads  # not called from here: bound, so that one application has both

    async def __call__(self, name: str) -> Value:
        return self.end(name, self.begin(name))

    async def after(self, name: str, before: Value) -> tuple[Value, Value]:
        token = self.begin(name)
        await asyncio.sleep(0.002)
        return self.end(name, token), before

    async def slow(self, name: str, seconds: float) -> Value:
        token = self.begin(name)
        await asyncio.sleep(seconds)
        return self.end(name, token)

    async def flaky(self, name: str, times: int) -> Value:
        token = self.begin(name)
        await asyncio.sleep(0.01)
        self.fail(name, token, times)
        return self.end(name, token)

    async def items(self, name: str) -> AsyncIterator[tuple[str, int]]:
        token = self.begin(name)
        for n in range(ITEMS):
            yield name, n
            await asyncio.sleep(0.005)
        self.end(name, token)


@serve.deployment(
    num_replicas=2,
    result_ttl_s=7200,
    max_attempts=100,
    sync_threads=8,
    max_ongoing_requests=100,
    health_check_timeout_s=HEALTH_TIMEOUT_S,
)
class Threads(Attempts):
    def __call__(self, name: str) -> Value:
        token = self.begin(name)
        time.sleep(0.002)
        return self.end(name, token)

    def after(self, name: str, before: Value) -> tuple[Value, Value]:
        return self.end(name, self.begin(name)), before


app = Work.bind(Threads.bind())


def _note_what_is_accepted(ledger: Ledger) -> None:
    """Have the finisher of this process say what the server has taken. What it does not hear of for a kill, clients may."""
    finished = Finisher._finished

    def noting(self: Finisher, lane: str, batch: list[Any], reply: Any) -> None:
        if not isinstance(reply, Exception):
            refused = {position for position, why in reply[0].items() if why != "done"}
            ledger.note_all(
                ("accepted", batch[i + 1].decode(), f"{lane}/{batch[i].decode()}", os.getpid())
                for i in range(0, len(batch), FIELDS)
                if i // FIELDS not in refused
            )
        finished(self, lane, batch, reply)

    Finisher._finished = noting  # type: ignore[method-assign]
