"""Deadlines of what runs: the server is asked until it answers, and what it says counts."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from millstream.broker.call import Call
from millstream.broker.keys import DeploymentKeys
from millstream.broker.scripts import Ended, Waiter
from millstream.errors import BrokerUnavailableError
from millstream.replicas import expiry
from millstream.replicas.expiry import Expiry, ServerClock
from tests.helpers import wait_until
from tests.timing import timed

pytestmark = pytest.mark.anyio

KEYS = DeploymentKeys("ms", "app.Model")
LOST = BrokerUnavailableError("lost")
Answer = tuple[Ended, int] | Exception


class Stage:
    """A server that answers as told, one answer after the other, and a supplier that notes what it is given."""

    def __init__(self, *answers: Answer, waiters: list[Waiter] | None = None) -> None:
        self.answers, self.waiters = list(answers), waiters or []
        self.supplied: list[Waiter] = []
        self.clock = ServerClock()
        self._chores: set[asyncio.Task[None]] = set()
        self.expiry = Expiry(self._run, self, KEYS, self.clock, self._start_chore)  # type: ignore[arg-type]

    async def _run(self, call: Call[Any]) -> Any:
        assert call.script.name == "cancel" and call.arguments[0] == "timed_out"
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [answer], self.waiters

    async def supply_all(self, tag: str, waiters: list[Waiter]) -> None:
        await asyncio.sleep(0)
        self.supplied += waiters

    def _start_chore(self, chore: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def finish(self) -> None:
        await asyncio.sleep(0)
        while self._chores:
            await asyncio.wait(self._chores)


async def test_request_in_time_is_started_without_asking() -> None:
    stage = Stage()

    assert await stage.expiry.has_passed(b"r", int(stage.clock.now_ms()) + 1000) is False


@pytest.mark.parametrize("answer", [Ended.ENDED, Ended.GONE])
async def test_request_past_its_deadline_is_not_started(answer: Ended) -> None:
    stage = Stage((answer, 0))

    assert await stage.expiry.has_passed(b"r", 1) is True


async def test_request_is_started_where_the_server_says_that_there_is_time() -> None:
    stage = Stage((Ended.EARLY, 500))

    assert await stage.expiry.has_passed(b"r", 1) is False


async def test_server_that_cannot_be_asked_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expiry, "RETRY_S", 0.01)
    stage = Stage(LOST, LOST, (Ended.ENDED, 0))

    assert await stage.expiry.has_passed(b"r", 1) is True

    assert stage.answers == []


@timed
async def test_running_request_is_ended_at_its_deadline_and_its_dependants_are_told() -> None:
    waiter = Waiter(b"r", "app.Model~w")
    stage = Stage((Ended.ENDED, 0), waiters=[waiter])
    started = time.monotonic()

    stage.expiry.watch(b"r", int(stage.clock.now_ms()) + 50)
    await wait_until(lambda: not stage.answers)
    await stage.finish()

    assert 0.045 <= time.monotonic() - started < 0.3
    assert stage.supplied == [waiter]


@timed
async def test_where_our_clock_is_ahead_the_server_is_asked_again_at_its_own_time() -> None:
    stage = Stage((Ended.EARLY, 40), (Ended.ENDED, 0))
    started = time.monotonic()

    stage.expiry.watch(b"r", int(stage.clock.now_ms()))
    await wait_until(lambda: not stage.answers)
    await stage.finish()

    assert 0.035 <= time.monotonic() - started < 0.3


@pytest.mark.parametrize("answer", [LOST, (Ended.EARLY, -1), (Ended.GONE, 0)])
async def test_what_needs_no_end_from_us_is_left_alone(answer: Answer) -> None:
    stage = Stage(answer)

    stage.expiry.watch(b"r", int(stage.clock.now_ms()))
    await wait_until(lambda: not stage.answers)
    await stage.finish()

    assert stage.supplied == []


async def test_request_that_ends_by_itself_is_not_asked_about() -> None:
    stage = Stage()

    stage.expiry.watch(b"r", int(stage.clock.now_ms()) + 10).cancel()
    await asyncio.sleep(0.03)
    await stage.finish()


async def test_clock_of_the_server_is_read_from_the_middle_of_the_round_trip() -> None:
    clock = ServerClock()

    async def ask(command: str) -> list[bytes]:
        await asyncio.sleep(0.02)
        at = time.time() + 1000
        await asyncio.sleep(0.02)
        return [b"%d" % int(at), b"%d" % int(at % 1 * 1e6)]

    await clock.set(ask)

    assert clock.now_ms() == pytest.approx((time.time() + 1000) * 1000, abs=15)
