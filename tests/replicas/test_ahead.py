"""A replica whose requests are short has the next ones at hand; nobody is the worse for it."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from millstream.broker.connection import Control, run
from millstream.broker.control_scripts import backlog
from millstream.replicas import pace
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Stage

pytestmark = pytest.mark.anyio
HOLD = "hold"


class Model:
    """Runs in a thread; one of its requests waits at the gate."""

    def __init__(self, gate: Gate, ran: list[Any]) -> None:
        self._gate, self._ran = gate, ran

    def __call__(self, x: Any) -> Any:
        if x == HOLD:
            self._gate.wait_in_thread()
        self._ran.append(x)
        return x


class Suspends(Model):
    """Where one more would run and not wait."""

    async def other(self) -> None: ...


@pytest.fixture(autouse=True)
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run counts as short."""
    monkeypatch.setattr(pace, "AHEAD_S", 10.0)
    monkeypatch.setattr(pace, "STILL_S", 60.0)


async def is_taken(stage: Stage, redis: Control, count: int) -> bool:
    return (await run(redis, backlog(stage.keys))).in_flight == count


async def is_done(stage: Stage, redis: Control) -> bool:
    return await redis.hlen(stage.keys.open) == 0


Ran = list[Any]
Serve = Callable[..., Any]


async def hold_with_others_ahead(stage: Stage, redis: Control, gate: Gate, ran: Ran, others: int = 40) -> list[str]:
    """One runs and waits, and as many as may be were taken ahead. The refs of those that have not run."""
    await stage.start(Model, gate, ran)
    refs = await stage.submit(redis, *range(2 * pace.PROVEN), HOLD, *[f"late {x}" for x in range(others)])
    await wait_until(lambda: gate.inside == 1)
    await wait_until(lambda: is_taken(stage, redis, 1 + min(pace.MOST, others)))
    return refs[2 * pace.PROVEN + 1 :]


async def test_next_ones_of_a_backlog_are_at_hand_and_all_run_in_order(stage: Stage, redis: Control) -> None:
    gate, ran = Gate(), Ran()
    await hold_with_others_ahead(stage, redis, gate, ran)
    gate.open()

    await wait_until(lambda: is_done(stage, redis))
    assert ran == [*range(2 * pace.PROVEN), HOLD, *[f"late {x}" for x in range(40)]]


async def test_those_that_wait_behind_a_long_one_run_on_another_replica(
    stage: Stage, redis: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, ran = Gate(), Ran()
    await hold_with_others_ahead(stage, redis, gate, ran)
    await stage.start(Model, gate, ran)
    await wait_until(lambda: len(ran) == 2 * pace.PROVEN + 40 - pace.MOST)  # the other has run what was not taken

    monkeypatch.setattr(pace, "STILL_S", 0.0)
    intake_of(stage)._look_after_ahead()  # as its timer does

    await wait_until(lambda: len(ran) == 2 * pace.PROVEN + 40)
    assert gate.inside == 1 and await is_taken(stage, redis, 1)
    gate.open()
    await wait_until(lambda: is_done(stage, redis))
    assert set(Counter(ran).values()) == {1}


async def test_timer_gives_them_back(stage: Stage, redis: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "STILL_S", 0.2)
    gate, ran = Gate(), Ran()
    await stage.start(Model, gate, ran)
    await stage.submit(redis, *range(2 * pace.PROVEN), HOLD, "a", "b")

    await wait_until(lambda: len(ran) == 2 * pace.PROVEN)
    await wait_until(lambda: has_returned(stage, redis, 2))
    assert await is_taken(stage, redis, 1)
    gate.open()

    await wait_until(lambda: is_done(stage, redis))
    assert ran[-3:] == [HOLD, "a", "b"]


async def has_returned(stage: Stage, redis: Control, count: int) -> bool:
    return await redis.xlen(stage.keys.lane("returned")) == count


async def test_cancelled_before_it_has_begun_it_never_runs(stage: Stage, redis: Control) -> None:
    gate, ran = Gate(), Ran()
    await stage.start(Model, gate, ran)
    refs = [stage.handle.remote(x).ref for x in [*range(2 * pace.PROVEN), HOLD, "a", "b", "c"]]
    await wait_until(lambda: is_taken(stage, redis, 4))

    await asyncio.gather(*[ref.acancel() for ref in refs[-3:-1]])
    await wait_until(lambda: len(intake_of(stage)._executor.running) == 2)  # the replica has heard of it
    gate.open()

    assert await refs[-1] == "c"
    assert ran[2 * pace.PROVEN :] == [HOLD, "c"]


@pytest.mark.parametrize(("model", "threads"), [(Suspends, 1), (Model, 2)])
async def test_nothing_is_taken_ahead_where_it_would_run_at_once(
    stage: Stage, redis: Control, model: type[Model], threads: int
) -> None:
    gate, ran = Gate(), Ran()
    await stage.start(model, gate, ran, max_ongoing_requests=1, sync_threads=threads)
    await stage.submit(redis, *range(2 * pace.PROVEN), HOLD, *range(20))

    await wait_until(lambda: gate.inside == 1)
    assert not await is_taken(stage, redis, 2)
    gate.open()
    await wait_until(lambda: is_done(stage, redis))
    assert gate.most == 1


async def test_replica_that_drains_gives_back_what_it_has_not_begun(stage: Stage, redis: Control) -> None:
    gate, ran = Gate(), Ran()
    await hold_with_others_ahead(stage, redis, gate, ran, others=10)

    draining = asyncio.create_task(stage.drain())
    await wait_until(lambda: has_returned(stage, redis, 10))
    gate.open()
    await draining
    await stage.start(Model, gate, ran)

    await wait_until(lambda: is_done(stage, redis))
    assert set(Counter(ran).values()) == {1} and len(ran) == 2 * pace.PROVEN + 11


async def test_urgent_one_waits_only_for_those_that_were_taken_before(stage: Stage, redis: Control) -> None:
    gate, ran = Gate(), Ran()
    await hold_with_others_ahead(stage, redis, gate, ran)

    await stage.submit(redis, "urgent", lane="high")
    gate.open()

    await wait_until(lambda: is_done(stage, redis))
    assert ran.index("urgent") <= 2 * pace.PROVEN + 1 + 2 * pace.MOST


# what cannot suspend, and so ends where it is called


class Prompt:
    """One of its methods ends at once, another one takes a slot for as long as the gate is shut."""

    def __init__(self, gate: Gate, ran: list[Any]) -> None:
        self._gate, self._ran = gate, ran

    async def __call__(self, x: Any) -> Any:
        self._ran.append(x)
        return x

    async def held(self, x: Any) -> Any:
        await self._gate.wait()
        self._ran.append(x)
        return x

    async def slow(self, x: Any) -> Any:
        time.sleep(2 * pace.AHEAD_S)  # noqa: ASYNC251 - what is not to be done, and is
        self._ran.append(x)
        return x


def note_claims(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many of a batch the replica starts, from now on."""
    intake, counts = intake_of(stage), list[int]()
    start = intake._start

    def noted(claimed: list[Any]) -> None:
        counts.append(sum(len(entries) for _, entries in claimed))
        start(claimed)

    monkeypatch.setattr(intake, "_start", noted)
    return counts


async def test_more_than_the_slots_are_taken_of_what_ends_at_once_and_all_run_in_order(
    stage: Stage, redis: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, ran = Gate(), Ran()
    await stage.start(Prompt, gate, ran, max_ongoing_requests=40)
    counts = note_claims(stage, monkeypatch)

    await stage.submit(redis, *range(1000))
    await wait_until(lambda: is_done(stage, redis))

    assert ran == [*range(1000)]
    assert max(counts) == (40 + pace.MOST_PROMPT) // 2


async def test_of_what_takes_its_time_no_more_than_the_slots_are_taken(
    stage: Stage, redis: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "AHEAD_S", 0.001)
    gate, ran = Gate(), Ran()
    await stage.start(Prompt, gate, ran, max_ongoing_requests=10)
    counts = note_claims(stage, monkeypatch)

    await stage.submit(redis, *range(60), method="slow")
    await wait_until(lambda: is_done(stage, redis))

    assert ran == [*range(60)]
    assert max(counts) <= 5


@pytest.mark.parametrize("limit", [1, 7])
async def test_never_more_run_than_allowed_when_those_that_follow_do_not_end_at_once(
    stage: Stage, redis: Control, limit: int
) -> None:
    gate, ran = Gate(), Ran()
    await stage.start(Prompt, gate, ran, max_ongoing_requests=limit)

    await stage.submit(redis, *range(200))
    await stage.submit(redis, *[f"held {x}" for x in range(200)], method="held")

    await wait_until(lambda: gate.inside == limit)
    await wait_until(lambda: is_taken(stage, redis, limit))  # the surplus is back in its lane
    gate.open()
    await wait_until(lambda: is_done(stage, redis))
    assert gate.most == limit
    assert ran[:200] == [*range(200)]
    assert Counter(ran[200:]) == Counter(f"held {x}" for x in range(200))


def intake_of(stage: Stage) -> Any:
    """Of its first replica."""
    return stage._hosted[0].replica._intake
