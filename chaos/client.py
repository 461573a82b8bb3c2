"""A client process: makes the requests of its plan at a steady rate, and leaves in the ledger what became of each.

    python -m chaos.client SEED CLIENT GENERATION REQUESTS RATE LEDGER

One that was killed has a successor, of the next generation: it follows to their end the requests of its predecessors
whose ref ids it finds, sends those again that have an idempotency key, and goes on with the plan.
"""

import argparse
import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from chaos.application import ITEMS
from chaos.ledger import Ledger, Line, read
from chaos.plan import Kind, Step, steps
from millstream import serve
from millstream.errors import BrokerUnavailableError, RefNotFoundError, RequestCancelledError
from millstream.handles.ref import ObjectRef

AT_ONCE = 24  # steps of one client


class Client:
    def __init__(self, ledger: Ledger, name: str, generation: int) -> None:
        self._ledger, self._name, self._me = ledger, name, f"{name}/{generation}"
        self._work = serve.get_deployment_handle("Work")
        self._blocking = serve.get_deployment_handle("Work", sync=True)
        self._threads = serve.get_deployment_handle("Threads")

    async def run(self, plan: list[Step], rate: float, before: list[Line]) -> None:
        """Follow what predecessors have left open; make the steps at `rate` requests a second, or as fast as they end."""
        self._ledger.note("begin", self._me, os.getpid())
        await connect()
        slots, started = asyncio.Semaphore(AT_ONCE), time.monotonic()
        first = plan[0].number if plan else 0
        async with asyncio.TaskGroup() as tasks:
            for name, kind, ref_id in left_open(before):
                tasks.create_task(self._noted(name, self._follow(name, kind, ref_id)))
            for step in plan:
                await asyncio.sleep(max(0.0, started + (step.number - first) / rate - time.monotonic()))
                await slots.acquire()
                task = tasks.create_task(self._make(step))
                task.add_done_callback(lambda _: slots.release())
        self._ledger.note("leave", self._me, os.getpid())

    async def _make(self, step: Step) -> None:
        names = [f"{self._name}-{step.number + i}" for i in range(step.count)]
        self._ledger.note_all(("submit", name, self._me, step.kind) for name in names)
        match step.kind:
            case Kind.MAP:
                await self._map(names)
            case Kind.CHAIN:
                await self._chain(*names)
            case Kind.KEYED:
                await self._keyed(names[0])
            case _:
                await self._noted(names[0], SINGLE[step.kind](self, names[0], step.chance))

    async def _noted(self, name: str, value: Awaitable[str]) -> None:
        """Note how it ends: with the token of the attempt that the value is of, or with an error."""
        try:
            token = await value
        except RequestCancelledError:
            self._ledger.note("end", name, "cancelled")
        except Exception as e:
            self._ledger.note("end", name, f"{type(e).__name__}:{'_'.join(str(e).split())[:300]}")
        else:
            self._ledger.note("end", name, "ok", token)

    # kinds of one request: each gives the token

    async def _call(self, name: str, chance: float) -> str:
        return token_of(name, await self._work.call(name))

    async def _with_blocking_call(self, name: str, chance: float) -> str:
        return token_of(name, await asyncio.to_thread(self._blocking.call, name))

    async def _threaded(self, name: str, chance: float) -> str:
        return token_of(name, await self._threads.call(name))

    async def _slow(self, name: str, chance: float) -> str:
        sending = self._work.slow.options(block_until="queued").remote(name, 0.1 + 1.9 * chance)
        return token_of(name, await (await self._sent(name, sending)))

    async def _flaky(self, name: str, chance: float) -> str:
        return token_of(name, await (await self._sent(name, self._work.flaky.remote(name, 1 + int(chance * 2)))))

    async def _stream(self, name: str, chance: float) -> str:
        items = [item async for item in self._work.items.stream(name)]
        if items != [(name, n) for n in range(ITEMS)]:
            raise AssertionError(f"items {items}")
        return "-"

    async def _cancelled(self, name: str, chance: float) -> str:
        ref = await self._sent(name, self._work.slow.options(block_until="queued").remote(name, 0.2))
        await asyncio.sleep(chance * 0.3)
        said = await asyncio.to_thread(ref.cancel)
        try:
            token = token_of(name, await ref)
        except RequestCancelledError:
            if said:
                raise
            raise AssertionError("cancel() said that it had ended, and yet it was cancelled") from None
        if said:
            raise AssertionError("cancel() said that it was cancelled, and yet it has a value")
        return token

    # of several

    async def _map(self, names: list[str]) -> None:
        try:
            values = [value async for value in self._work.map(names, return_exceptions=True)]
        except Exception as e:
            values = [e] * len(names)
        for name, value in zip(names, values, strict=True):
            await self._noted(name, given(name, value))

    async def _chain(self, first: str, second: str) -> None:
        before = self._work.slow.options(block_until="queued").remote(first, 0.01)
        after = self._threads.after.options(block_until="queued").remote(second, before)

        async def of_first() -> str:
            return token_of(first, await (await self._sent(first, before)))

        async def of_second() -> str:
            value, upstream = await (await self._sent(second, after))
            if upstream != (first, token_of(first, await (await before))):
                raise AssertionError(f"the argument of {second} was {upstream}")
            return token_of(second, value)

        await asyncio.gather(self._noted(first, of_first()), self._noted(second, of_second()))

    async def _sent(self, name: str, sending: Awaitable[ObjectRef[Any]]) -> ObjectRef[Any]:
        ref = await sending
        self._ledger.note("ref", name, ref.id)
        return ref

    async def _keyed(self, name: str) -> None:
        await self._noted(name, self._of_key(name))

    async def _of_key(self, name: str) -> str:
        handle = self._work.options(idempotency_key=name)
        first, second = await asyncio.gather(handle.call(name), handle.call(name))
        if first != second:
            raise AssertionError(f"one key, two values: {first} and {second}")
        return token_of(name, first)

    async def _follow(self, name: str, kind: str, ref_id: str) -> str:
        if kind == Kind.KEYED:
            return await self._of_key(name)
        value = await ObjectRef.from_id(ref_id)
        return token_of(name, value[0] if isinstance(value[0], tuple) else value)


Single = Callable[[Client, str, float], Awaitable[str]]
SINGLE: dict[Kind, Single] = {
    Kind.CALL: Client._call,
    Kind.BLOCKING: Client._with_blocking_call,
    Kind.THREADED: Client._threaded,
    Kind.SLOW: Client._slow,
    Kind.FLAKY: Client._flaky,
    Kind.STREAM: Client._stream,
    Kind.CANCEL: Client._cancelled,
}


async def connect() -> None:
    """Connect both engines of this process. A first connection that fails is told to who asks, and not tried again."""
    nobody = "default.Work~" + "0" * 22
    for look in (lambda: _look(nobody), lambda: asyncio.to_thread(ObjectRef.from_id(nobody).result)):
        while True:
            try:
                await look()
            except RefNotFoundError:
                break
            except BrokerUnavailableError:
                await asyncio.sleep(0.1)


async def _look(ref_id: str) -> object:
    return await ObjectRef.from_id(ref_id)


def token_of(name: str, value: Any) -> str:
    """The token in a value, which must be of this request."""
    if not isinstance(value, tuple) or value[0] != name:
        raise AssertionError(f"the value of {name} is {value!r}")
    return str(value[1])


async def given(name: str, value: Any) -> str:
    if isinstance(value, Exception):
        raise value
    return token_of(name, value)


def left_open(before: list[Line]) -> list[tuple[str, str, str]]:
    """Requests of predecessors that may have been sent and have not ended, where they can be found: name, kind, ref id."""
    kinds = {line.who: line.more for line in before if line.event == "submit"}
    refs = {line.who: line.what for line in before if line.event == "ref"}
    ended = {line.who for line in before if line.event == "end"}
    return [
        (name, kind, refs.get(name, "")) for name, kind in kinds.items()
        if name not in ended and (name in refs or kind == Kind.KEYED)
    ]  # fmt: skip


def rest_of(plan: list[Step], before: list[Line]) -> list[Step]:
    """The steps that no predecessor has begun."""
    begun = [int(line.who.rpartition("-")[2]) for line in before if line.event == "submit"]
    return [step for step in plan if step.number > max(begun, default=-1)]


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in (
        ("seed", int), ("client", int), ("generation", int), ("requests", int), ("rate", float), ("ledger", Path),
    ):  # fmt: skip
        parser.add_argument(name, type=kind)
    o = parser.parse_args()
    threading.Thread(target=_end_with_owner, daemon=True).start()
    before = [line for line in read(o.ledger)[0] if line.who.startswith(f"c{o.client}-")]
    plan = rest_of(list(steps(o.seed, o.client, o.requests)), before)
    uvloop.run(_run(Ledger(o.ledger), f"c{o.client}", o.generation, plan, o.rate, before))


def _end_with_owner() -> None:
    """It holds the other end of our stdin."""
    os.read(0, 1)  # not through sys.stdin: its lock would be held at our own end
    os._exit(1)


async def _run(ledger: Ledger, name: str, generation: int, plan: list[Step], rate: float, before: list[Line]) -> None:
    await Client(ledger, name, generation).run(plan, rate, before)


if __name__ == "__main__":
    main()
