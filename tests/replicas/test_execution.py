"""How requests run inside a replica: on the loop or in threads, beside each other, and never more than allowed."""

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from millstream.broker.connection import Control
from millstream.replicas.attempt import Attempt, read_entry
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Stage

# the stream entry


def test_entry_as_submit_writes_it() -> None:
    fields = [b"ref", b"r", b"method", b"m", b"reply", b"c", b"body", b"b"]

    assert read_entry("normal", b"1-0", fields) == Attempt("normal", b"1-0", b"r", b"m", b"c", b"b", {})


def test_entry_with_a_wish_values_and_a_history_in_any_order() -> None:
    fields = [
        b"history", b"[]", b"dep:app.Up~x", b"value", b"body", b"b", b"want", b"matched", b"reply", b"c", b"attempt", b"2",
        b"ref", b"r", b"lane", b"low", b"method", b"m",
    ]  # fmt: skip

    attempt = read_entry("returned", b"1-0", fields)

    assert attempt[:6] == ("returned", b"1-0", b"r", b"m", b"c", b"b")
    assert (attempt.more[b"want"], attempt.supplied) == (b"matched", {"app.Up~x": b"value"})
    assert (attempt.deadline_ms, attempt.max_ahead) == (None, None)


@pytest.mark.parametrize("fields", [[b"ref", b"r"], [b"what", b"ever"], []])
def test_entry_that_is_no_request_is_refused(fields: list[bytes]) -> None:
    with pytest.raises(KeyError):
        read_entry("normal", b"1-0", fields)


# on the loop


request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")


class Model:
    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate or Gate()

    async def set_promptly(self, value: str) -> str:
        before = request_id.get()
        request_id.set(value)
        return before

    async def set_and_wait(self, value: str) -> tuple[str, str]:
        before = request_id.get()
        request_id.set(value)
        await asyncio.sleep(0.005)
        return before, request_id.get()

    def set_in_thread(self, value: str) -> str:
        before = request_id.get()
        request_id.set(value)
        return before

    async def timeout(self) -> str:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(10)
        except TimeoutError:
            return "timed out"
        return "no"

    async def anyio_scope(self) -> bool:
        with anyio.move_on_after(0.01) as scope:
            await anyio.sleep(10)
        return scope.cancelled_caught

    async def task_group(self) -> int:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(asyncio.sleep(0, x)) for x in range(3)]
        return sum(task.result() for task in tasks)

    async def own_task(self) -> bool:
        first = asyncio.current_task()
        await asyncio.sleep(0)
        return first is not None and first is asyncio.current_task()

    async def held(self) -> None:
        await self.gate.wait()

    def held_in_thread(self) -> str:
        self.gate.wait_in_thread()
        return threading.current_thread().name

    async def quick(self, x: int) -> int:
        return x


@pytest.mark.anyio
async def test_what_needs_a_task_of_its_own_has_one(stage: Stage) -> None:
    await stage.start(Model)
    handle = stage.handle

    assert await handle.timeout.call() == "timed out"
    assert await handle.anyio_scope.call() is True
    assert await handle.task_group.call() == 3
    assert await handle.own_task.call() is True


@pytest.mark.anyio
async def test_context_variables_stay_with_their_request(stage: Stage) -> None:
    await stage.start(Model)
    handle = stage.handle

    for method in (handle.set_promptly, handle.set_in_thread):
        assert [await method.call(str(x)) for x in range(3)] == ["none"] * 3
    values = await asyncio.gather(*[handle.set_and_wait.call(str(x)) for x in range(20)])
    assert values == [("none", str(x)) for x in range(20)]


# in threads


@pytest.mark.anyio
async def test_sync_method_runs_off_the_loop_and_holds_nobody_up(stage: Stage) -> None:
    gate = Gate()
    await stage.start(Model, gate)
    blocked = stage.handle.held_in_thread.call()
    await wait_until(lambda: gate.inside == 1)

    assert await asyncio.wait_for(asyncio.gather(*[stage.handle.quick.call(x) for x in range(50)]), 5) == list(
        range(50)
    )

    gate.open()
    assert (await blocked).startswith("millstream-sync")


@pytest.mark.anyio
@pytest.mark.parametrize("threads", [1, 3])
async def test_no_more_sync_methods_run_at_once_than_there_are_threads(stage: Stage, threads: int) -> None:
    gate = Gate()
    await stage.start(Model, gate, sync_threads=threads, max_ongoing_requests=20)
    futures = [stage.handle.held_in_thread.call() for _ in range(20)]
    await wait_until(lambda: gate.inside == threads)
    with anyio.move_on_after(0.03):
        await asyncio.wait(futures)

    assert gate.most == threads
    gate.open()
    names = set(await asyncio.gather(*futures))
    assert (gate.most, len(names)) == (threads, threads)


# limits


class Counting:
    """Keeps a ledger of how many run at once."""

    def __init__(self) -> None:
        self.now, self.most, self.runs = 0, 0, 0
        self._lock = threading.Lock()

    async def on_loop(self, s: float) -> None:
        self._enter()
        await asyncio.sleep(s)
        self._leave()

    def in_thread(self, s: float) -> None:
        self._enter()
        time.sleep(s)
        self._leave()

    async def ledger(self) -> tuple[int, int]:
        return self.most, self.runs

    def _enter(self) -> None:
        with self._lock:
            self.now += 1
            self.runs += 1
            self.most = max(self.most, self.now)

    def _leave(self) -> None:
        with self._lock:
            self.now -= 1


@pytest.mark.anyio
@pytest.mark.parametrize("limit", [1, 2, 5, 16])
async def test_replica_never_runs_more_than_allowed(stage: Stage, redis: Control, limit: int) -> None:
    await stage.start(Counting, max_ongoing_requests=limit, sync_threads=limit)
    handle = stage.handle
    for lane in ("high", "normal", "low", "returned"):  # one of each at once, too: a blocked read brings up to four
        await stage.submit(redis, *[0.002] * 20, lane=lane, method="on_loop")

    await asyncio.gather(*[handle.on_loop.call(0.001) for _ in range(100)])
    await asyncio.gather(*[handle.in_thread.call(0.001) for _ in range(50)])
    for lane in ("low", "normal", "high"):
        await stage.submit(redis, 0.002, lane=lane, method="on_loop")

    async def all_ran() -> bool:
        return bool((await handle.ledger.call())[1] == 233)

    await wait_until(all_ran)
    assert await handle.ledger.call() == (limit, 233)


@pytest.mark.anyio
async def test_replicas_share_the_work_and_each_keeps_its_own_limit(stage: Stage) -> None:
    gate = Gate()
    for _ in range(3):
        await stage.start(Model, gate, max_ongoing_requests=4)
    futures = [stage.handle.held.call() for _ in range(40)]

    await wait_until(lambda: gate.inside == 12)
    with anyio.move_on_after(0.03):
        await asyncio.wait(futures)

    assert gate.most == 12
    gate.open()
    await asyncio.gather(*futures)
    assert gate.most == 12


@pytest.mark.anyio
@pytest.mark.parametrize("prepare", [lambda: "x", lambda: 3, lambda: None])
async def test_json_caller_is_answered_in_json(stage: Stage, redis: Control, prepare: Callable[[], Any]) -> None:
    await stage.start(Model)
    value = prepare()

    (ref,) = await stage.submit_json(redis, [value], method="quick")

    async def has_ended() -> bool:
        return bool(await redis.exists(stage.keys.result(ref)))

    await wait_until(has_ended)
    stored: Any = await redis.get(stage.keys.result(ref))
    assert stored.partition(b"\n")[2][:2] == b"\x01j"
    assert await stage.read(redis, ref) == value
