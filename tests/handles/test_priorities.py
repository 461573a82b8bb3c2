"""Priorities decide who is taken first; delays, who is not to be taken yet."""

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import anyio
import anyio.to_thread
import pytest

from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys
from millstream.broker.scripts import place
from millstream.broker.states import State
from millstream.config import Settings
from millstream.errors import ConfigError
from millstream.handles import engines
from millstream.handles.handle import DeploymentHandle, SyncHandle
from tests.handles.elsewhere import run_elsewhere
from tests.handles.held import Model, Notes
from tests.helpers import wait_until
from tests.replica_helpers import Serving
from tests.timing import timed

pytestmark = pytest.mark.anyio

PRECISION_S = 0.25  # some ms, and what other processes take of this machine


# priorities


async def queue(handle: DeploymentHandle, *names: str) -> list[Any]:
    """One request per name, whose first word is its priority; their refs."""
    return [await handle.options(priority=name.split()[0], block_until="queued").remote(name) for name in names]


async def test_waiting_requests_are_taken_by_priority_and_in_order_within_each(serving: Serving, notes: Notes) -> None:
    handle = serving(Model, notes, max_ongoing_requests=1)
    await handle.remote("first")
    refs = await queue(handle, "low 1", "normal 1", "high 1", "low 2", "high 2", "normal 2")

    notes.gate.open()

    await asyncio.gather(*refs)
    assert notes.started == ["first", "high 1", "high 2", "normal 1", "normal 2", "low 1", "low 2"]


async def test_urgent_request_overtakes_a_deep_backlog(serving: Serving, notes: Notes) -> None:
    handle = serving(Model, notes, max_ongoing_requests=1)
    await handle.remote("first")
    backlog = [handle.options(priority="low").call(x) for x in range(500)]
    (urgent,) = await queue(handle, "high")

    notes.gate.open()

    await urgent
    assert notes.started.index("high") == 1, "a replica with one slot looks at all lanes before each request"
    await asyncio.gather(*backlog)


async def test_low_priority_starves_as_long_as_there_is_something_better(serving: Serving, notes: Notes) -> None:
    handle = serving(Model, notes, max_ongoing_requests=1)
    await handle.remote("first")
    refs = await queue(handle, "low", *["high"] * 100, *["normal"] * 100)

    notes.gate.open()

    await asyncio.gather(*refs)
    assert notes.started.index("low") == 201, "by design"


async def test_running_request_is_not_interrupted_by_an_urgent_one(serving: Serving, notes: Notes) -> None:
    handle = serving(Model, notes, max_ongoing_requests=1)
    await handle.options(priority="low").remote("low")

    (urgent,) = await queue(handle, "high")

    assert await urgent.astatus() is State.QUEUED
    assert notes.cancelled == []


async def test_parked_and_delayed_requests_keep_their_priority(serving: Serving, notes: Notes) -> None:
    handle = serving(Model, notes, max_ongoing_requests=1)
    upstream = await handle.echo.remote("value")
    await upstream
    await handle.remote("first")
    await queue(handle, "normal")
    delayed = handle.options(priority="high", delay_s=0.05).call("high, delayed")
    parked = handle.options(priority="high").call(upstream)
    await wait_until(lambda: _both_queued(handle, delayed, parked))

    notes.gate.open()

    await asyncio.gather(delayed, parked)
    assert set(notes.started[1:3]) == {"high, delayed", "value"}


async def _both_queued(handle: DeploymentHandle, *futures: Any) -> bool:
    engine = engines.current()
    keys = engine.route(futures[0].codec.tag).keys
    states = [await engine.lines.run(place(keys, future.ref.decode())) for future in futures]
    return states == [State.QUEUED] * len(futures)


@pytest.mark.parametrize("priority", ["urgent", "", None, 1])
def test_priority_is_one_of_three(priority: Any) -> None:
    with pytest.raises(ConfigError, match=r"'high' or 'normal' or 'low'"):
        DeploymentHandle("Model").options(priority=priority)


# delays


async def started_after(make: Callable[[], Any]) -> float:
    """How long after it was made a call to `clock` ran."""
    before = time.time()
    ran_at: float = await make()
    return ran_at - before


async def clock(*_: Any) -> float:
    return time.time()


@timed
async def test_delayed_request_is_matched_at_once_and_runs_when_it_is_due(serving: Serving) -> None:
    handle = serving(clock).options(delay_s=0.3)
    before = time.time()

    ref = await handle.remote()

    assert time.time() - before < 0.2
    assert await ref.astatus() is State.DELAYED
    assert 0.3 <= await ref - before < 0.3 + PRECISION_S


@pytest.mark.parametrize(
    "eta",
    [
        lambda: time.time() + 0.3,
        lambda: datetime.now(UTC) + timedelta(seconds=0.3),
        lambda: datetime.now(timezone(timedelta(hours=-9))) + timedelta(seconds=0.3),
    ],
    ids=["Unix time", "UTC", "another time zone"],
)
@timed
async def test_eta_is_a_moment(serving: Serving, eta: Callable[[], Any]) -> None:
    handle = serving(clock)
    await handle.call()

    after_s = await started_after(lambda: handle.options(eta=eta()).call())

    assert 0.299 <= after_s < 0.3 + PRECISION_S


@timed
@pytest.mark.parametrize("eta", [0, 1, datetime(2001, 1, 1, tzinfo=UTC)])
async def test_eta_in_the_past_is_now(serving: Serving, eta: Any) -> None:
    handle = serving(clock)
    await handle.call()

    assert await started_after(lambda: handle.options(eta=eta).call()) < PRECISION_S


@timed
async def test_handle_with_an_eta_is_prompt_once_it_has_passed(serving: Serving) -> None:
    handle = serving(clock).options(eta=time.time() + 0.2)
    await handle.call()

    assert await started_after(handle.call) < PRECISION_S


@timed
async def test_sync_code_delays_too(serving: Serving) -> None:
    handle = serving(clock)
    blocking = SyncHandle(handle.deployment_name, handle.app_name).options(delay_s=0.2)
    before = time.time()

    assert 0.2 <= await anyio.to_thread.run_sync(blocking.call) - before < 0.2 + PRECISION_S


async def test_delayed_requests_run_in_the_order_of_their_times(serving: Serving, notes: Notes) -> None:
    handle = serving(Model, notes)
    notes.gate.open()

    await asyncio.gather(*[handle.options(delay_s=s / 10).call(s) for s in (4, 2, 5, 1, 3)])

    assert notes.started == [1, 2, 3, 4, 5]


@timed
async def test_request_of_a_caller_that_is_gone_runs_within_about_a_second_of_its_time(
    serving: Serving, settings: Settings, notes: Notes
) -> None:
    serving(Model, notes)
    code = """
        from millstream import SyncHandle

        SyncHandle("Model", "app").options(delay_s=0.5).remote("it")
        """

    await run_elsewhere(settings, code)

    assert notes.started == []
    await wait_until(lambda: notes.started == ["it"], 0.5 + 1.5)


@timed
@pytest.mark.parametrize("first", ["the time", "the value"])
async def test_request_waits_for_its_time_and_for_its_values(serving: Serving, notes: Notes, first: str) -> None:
    class Clock:
        async def __call__(self, value: Any) -> tuple[Any, float]:
            return value, time.time()

    upstream = serving(Model, notes).remote("value")
    handle = serving(Clock)
    before = time.time()
    ref = await handle.options(delay_s=0.3).remote(upstream)
    assert await ref.astatus() is State.PARKED

    await asyncio.sleep(0.5 if first == "the time" else 0.1)
    notes.gate.open()

    value, ran_at = await ref
    due_s = 0.5 if first == "the time" else 0.3
    assert value == "value" and due_s <= ran_at - before < due_s + 0.1 + PRECISION_S


async def test_very_many_delayed_requests_for_the_same_moment_all_run(serving: Serving, redis: Control) -> None:
    handle = serving(Model)
    await handle.echo.call(0)
    eta = time.time() + 0.5  # some of them reach the server later than that

    futures = [handle.options(eta=eta).echo.call(x) for x in range(1000)]
    values = await asyncio.wait_for(asyncio.gather(*futures), 5)  # sweepers would take ten seconds

    assert values == list(range(1000))
    assert await redis.exists(DeploymentKeys("ms", "app.Model").due) == 0


async def test_delayed_request_survives_its_replicas(serving: Serving, notes: Notes) -> None:
    handle = serving.deploy_only(Model)
    ref = await handle.options(delay_s=0.1).remote("it")
    await wait_until(lambda: _is_queued(ref), 3)

    serving.start_replica(handle, Model, notes)
    notes.gate.open()

    assert await asyncio.wait_for(ref, 5) == "it"


async def _is_queued(ref: Any) -> bool:
    return await ref.astatus() is State.QUEUED


def test_eta_needs_a_time_zone() -> None:
    with pytest.raises(ConfigError, match="has no time zone"):
        DeploymentHandle("Model").options(eta=datetime(2030, 1, 1))


@pytest.mark.parametrize("eta", ["tomorrow", -1, True, float("inf"), 1e12])
def test_eta_must_be_a_moment(eta: Any) -> None:
    with pytest.raises(ConfigError, match="eta="):
        DeploymentHandle("Model").options(eta=eta)


@pytest.mark.parametrize("delay_s", [-1, "1", None, float("nan"), True])
def test_delay_must_be_a_time(delay_s: Any) -> None:
    with pytest.raises(ConfigError, match="delay_s="):
        DeploymentHandle("Model").options(delay_s=delay_s)


def test_delay_and_eta_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"delay_s=1 and eta=5 exclude each other"):
        DeploymentHandle("Model").options(delay_s=1, eta=5)
