"""Requests that wait for room in a full queue: in their order, seldom asking, and no longer than they have time."""

import asyncio
import threading
import time
from typing import Any

import pytest

from millstream.broker.connection import Control
from millstream.errors import RequestCancelledError, RequestTimeoutError
from millstream.handles import engines, patience
from tests.handles.held import Model, Notes
from tests.handles.queues import LIMIT, full, patient, value_of
from tests.helpers import wait_until
from tests.replica_helpers import Serving, cut
from tests.servers import Server
from tests.timing import timed

pytestmark = pytest.mark.anyio

# waiting for room


@pytest.mark.parametrize("how", ["call", "remote", "queued", "sync call", "sync remote", "map", "large", "timed"])
async def test_patient_request_waits_for_room(serving: Serving, notes: Notes, how: str) -> None:
    handle = patient(await full(serving, notes))

    sending = asyncio.create_task(value_of(handle, how))
    await asyncio.wait([sending], timeout=0.2)
    assert not sending.done()
    notes.gate.open()

    assert await asyncio.wait_for(sending, 5) == (1_000_000 if how == "large" else "it")


async def test_patient_requests_get_in_in_their_order(serving: Serving) -> None:
    seen: list[int] = []

    class Notice:
        async def __call__(self, x: int) -> int:
            seen.append(x)
            await asyncio.sleep(0.0005)
            return x

    handle = patient(serving(Notice, max_ongoing_requests=1, max_queued_requests=7))

    futures = []
    for x in range(700):
        futures.append(handle.call(x))
        if x % 50 == 0:
            await asyncio.sleep(0.01)

    assert await asyncio.gather(*futures) == seen == list(range(700))


async def test_patient_request_does_not_overtake_those_that_wait_already(serving: Serving, notes: Notes) -> None:
    handle = patient(serving(Model, notes, max_ongoing_requests=1, max_queued_requests=1))
    await handle.remote("first")
    futures = [handle.call(x) for x in range(5)]
    await asyncio.sleep(0.3)  # the pause between two tries is long by now

    notes.gate.open()
    await wait_until(lambda: len(notes.started) >= 2)
    late = handle.call("late")

    await asyncio.gather(*futures, late)
    assert notes.started == ["first", *range(5), "late"]


async def test_who_waits_asks_seldom(serving: Serving, redis: Control, notes: Notes) -> None:
    handle = patient(await full(serving, notes))
    commands, calls = engines.current().lines.commands, list[tuple[float, int]]()
    assert commands is not None
    start = commands.start

    def counted(call: Any, callback: Any) -> None:
        if call.script.name == "submit":
            calls.append((time.monotonic(), (len(call.arguments) - 5) // 2))
        start(call, callback)

    commands.start = counted  # type: ignore[method-assign]

    futures = [handle.call(x) for x in range(500)]
    await asyncio.sleep(1.2)

    assert 5 <= len(calls) <= 12
    assert max(count for _, count in calls) == patience.AT_ONCE
    notes.gate.open()
    await asyncio.gather(*futures)


@timed
async def test_who_waits_gives_up_at_the_deadline(serving: Serving, notes: Notes) -> None:
    handle = patient(await full(serving, notes))
    behind = handle.call("behind")
    started = time.monotonic()

    with pytest.raises(RequestTimeoutError, match="the server had not taken it"):
        await handle.options(timeout_s=0.3).call("it")

    assert 0.3 <= time.monotonic() - started < 0.55
    notes.gate.open()
    assert await behind == "behind"
    assert "it" not in notes.started


@timed
async def test_time_in_the_line_counts(serving: Serving, notes: Notes) -> None:
    handle = patient(await full(serving, notes))
    started = time.monotonic()
    future = handle.options(timeout_s=1.0).told.call("it")

    await asyncio.sleep(0.6)
    notes.gate.open()
    with pytest.raises(RequestTimeoutError):
        await future

    assert notes.started[-1] == "it"
    assert 1.0 <= time.monotonic() - started < 1.25


@pytest.mark.parametrize("how", ["call", "large"])
async def test_who_waits_can_be_cancelled(serving: Serving, redis: Control, notes: Notes, how: str) -> None:
    handle = patient(await full(serving, notes))
    task = handle.remote("it" if how == "call" else b"x" * 1_000_000)
    behind = handle.call("behind")
    await asyncio.sleep(0.1)

    assert await asyncio.wait_for(task.ref.acancel(), 0.5) is True

    with pytest.raises(RequestCancelledError):
        await (await task)
    notes.gate.open()
    assert await behind == "behind"
    assert len(notes.started) == LIMIT + 2


async def test_cancelling_its_task_takes_a_request_out_of_the_line(serving: Serving, notes: Notes) -> None:
    handle = patient(await full(serving, notes))
    task = handle.remote("it")
    await asyncio.sleep(0.05)

    task.cancel()

    with pytest.raises(RequestCancelledError):
        await asyncio.wait_for(task.ref, 1)
    notes.gate.open()
    assert await handle.echo.call("after") == "after"
    assert "it" not in notes.started


async def test_request_that_cancels_or_ends_in_the_middle_of_the_line_holds_up_nobody(
    serving: Serving, notes: Notes
) -> None:
    handle = patient(await full(serving, notes))
    tasks = [handle.remote(f"task {x}") for x in range(300)]
    await asyncio.sleep(0.05)

    for task in tasks[10:290]:
        task.cancel()
    notes.gate.open()

    kept = tasks[:10] + tasks[290:]
    assert [await task.ref for task in kept] == [f"task {x}" for x in (*range(10), *range(290, 300))]
    assert len(notes.started) == 1 + LIMIT + 20


async def test_dependant_waits_until_what_it_needs_got_in(serving: Serving, notes: Notes) -> None:
    handle = patient(await full(serving, notes))
    dependant = handle.take.call(handle.remote("it"))
    await asyncio.sleep(0.1)

    notes.gate.open()

    assert await asyncio.wait_for(dependant, 5) == ("it",)


async def test_line_survives_lost_connections(serving: Serving, redis: Control) -> None:
    class Ledger:
        def __init__(self) -> None:
            self.runs: list[int] = []

        async def __call__(self, x: int) -> int:
            self.runs.append(x)
            await asyncio.sleep(0.001)
            return x

        async def ran(self) -> list[int]:
            return self.runs

    handle = patient(serving(Ledger, max_ongoing_requests=1, max_queued_requests=10))
    futures = [handle.call(x) for x in range(600)]

    for many in (100, 300):
        await wait_until(lambda many=many: sum(future.done() for future in futures) > many)
        await cut(redis, *[f"ms:{what}:{engines.current().name}" for what in ("client", "replies")])

    assert await asyncio.wait_for(asyncio.gather(*futures), 20) == list(range(600))
    assert await handle.ran.call() == list(range(600))


async def test_line_survives_a_restart_of_the_server(own_server: Server, serving_there: Serving, notes: Notes) -> None:
    handle = patient(await full(serving_there, notes))
    futures = [handle.call(f"patient {x}") for x in range(100)]
    await asyncio.sleep(0.05)

    own_server.kill()
    futures += [handle.call(f"later {x}") for x in range(100)]
    own_server.start()
    notes.gate.open()

    assert len(await asyncio.wait_for(asyncio.gather(*futures), 20)) == 200
    names = [name for name in notes.started if isinstance(name, str) and name != "first"]
    assert list(dict.fromkeys(names)) == [f"patient {x}" for x in range(100)] + [f"later {x}" for x in range(100)]


async def test_blocked_loop_has_its_line_sent_by_another_engine(
    serving: Serving, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_warned", set())
    handle = patient(serving(Model, notes, max_ongoing_requests=1, max_queued_requests=1))
    await handle.remote("first")
    refs = [handle.remote(x).ref for x in range(5)]
    await asyncio.sleep(0.05)

    opening = threading.Timer(0.2, notes.gate.open)
    opening.start()
    with pytest.warns(RuntimeWarning, match="blocks the running event loop"):
        assert refs[-1].result(10) == 4

    assert await asyncio.gather(*refs) == list(range(5))
    assert notes.started == ["first", *range(5)]
