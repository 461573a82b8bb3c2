"""The sweeper: takes over by lease only after a full lease of watching, and buries what is dead with all it held."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from millstream.broker import control_scripts
from millstream.broker.cluster import dial_everywhere
from millstream.broker.connection import Control, run, run_all
from millstream.broker.control_scripts import Swept, renew
from millstream.broker.keys import DeploymentKeys, Keys
from millstream.broker.records import ReplicaRecord
from millstream.broker.signed import Signer
from millstream.broker.states import State
from millstream.broker.supplying import Supplier
from millstream.broker.sweeper import AT_ONCE, Sweeper, bury
from millstream.config import Settings
from tests.helpers import (
    REPLICA,
    age,
    asking,
    deploy_config,
    read_state,
    read_states,
    seed_delayed,
    seed_parked,
    seed_queued,
    seed_running,
    wait_until,
)

pytestmark = pytest.mark.anyio

LEASE_S = 5.0


class Clock:
    """A time that the test moves."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sweeper(redis: Control, settings: Settings, clock: Clock) -> Sweeper:
    return Sweeper(settings, lambda call: run(redis, call), redis.execute_command, clock=clock)


async def watch(sweeper: Sweeper, clock: Clock, keys: DeploymentKeys, duration_s: float) -> None:
    """A pass now, and one a second from then on."""
    end_s = clock.now_s + duration_s
    await sweeper.step(keys.tag)
    while clock.now_s < end_s:
        clock.now_s = min(end_s, clock.now_s + 1)
        await sweeper.step(keys.tag)


async def register(redis: Control, settings: Settings, keys: DeploymentKeys, *connections: int) -> None:
    record = ReplicaRecord(REPLICA, "n-1", 1, "v", "RUNNING", 0, list(connections))
    await redis.hset(keys.replicas, REPLICA, Signer(settings).write(record, keys.tag, REPLICA))


@pytest.mark.fake
async def test_due_requests_are_queued(redis: Control, keys: DeploymentKeys, sweeper: Sweeper) -> None:
    await deploy_config(redis, keys)
    ref = await seed_delayed(redis, keys)
    await redis.zadd(keys.due, {ref: 1})

    await sweeper.step(keys.tag)

    assert await read_state(redis, keys, ref) == State.QUEUED


@pytest.mark.on_cluster
async def test_many_deployments_are_swept_together(
    redis: Control, settings: Settings, keys: DeploymentKeys, sweeper: Sweeper, caplog: pytest.LogCaptureFixture
) -> None:
    """As many as need several goes; one that some other program has written over keeps none from it."""
    every = [Keys(settings.namespace).deployment(f"app.M{number}") for number in range(2 * AT_ONCE + 1)]
    written_over, with_work = every[1], [every[0], every[2], every[AT_ONCE], every[-1]]
    await redis.set(written_over.due, "not a sorted set", ex=10)
    refs = {}
    for one in with_work:
        await deploy_config(redis, one)
        refs[one] = await seed_delayed(redis, one)
        await redis.zadd(one.due, {refs[one]: 1})

    for _ in range(2):
        await sweeper.step_all([one.tag for one in every], partial(run_all, redis))
    await redis.delete(written_over.due)

    assert [await read_state(redis, one, refs[one]) for one in with_work] == [State.QUEUED] * 4
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and written_over.tag in said[0] and "WRONGTYPE" in said[0]


@pytest.mark.fake
async def test_overdue_requests_time_out_and_their_dependants_fail(
    redis: Control, settings: Settings, keys: DeploymentKeys, sweeper: Sweeper
) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys, extras=asking(timeout_ms=3_600_000))
    (in_time,) = await seed_queued(redis, keys, extras=asking(timeout_ms=3_600_000))
    waiter = await seed_parked(redis, keys, f"{keys.tag}~{one.ref}")
    await Supplier(settings, lambda call: run(redis, call)).watch(f"{keys.tag}~{waiter}", f"{keys.tag}~{one.ref}")
    await age(redis, keys.deadlines, one.ref)

    await sweeper.step(keys.tag)

    states = await read_states(redis, keys, [one.ref, in_time, waiter])
    assert states == [State.TIMED_OUT, State.QUEUED, State.FAILED]
    assert 3_500_000 < await redis.pttl(keys.result(one.ref)) <= 3_600_000


@pytest.mark.fake
async def test_sweeper_that_dies_before_it_expires_leaves_that_to_others(
    redis: Control, keys: DeploymentKeys, sweeper: Sweeper
) -> None:
    await deploy_config(redis, keys)
    (ref,) = await seed_queued(redis, keys, extras=asking(timeout_ms=0))
    await run(redis, control_scripts.sweep(keys))  # and dies

    await sweeper.step(keys.tag)

    assert await read_state(redis, keys, ref) == State.TIMED_OUT


@pytest.mark.fake
async def test_hundreds_of_large_values_are_kept_in_the_course_of_some_passes(
    redis: Control, keys: DeploymentKeys, sweeper: Sweeper
) -> None:
    await deploy_config(redis, keys)
    refs = await seed_queued(redis, keys, 700)
    values = [DeploymentKeys("ms", f"up.D{number % 7}").value(ref, "1-1") for number, ref in enumerate(refs)]
    await redis.hset(keys.holds, mapping={ref: f"1 {value}" for ref, value in zip(refs, values, strict=True)})
    for value in values:
        await redis.set(value, b"a large value", px=60_000)

    async def all_are_kept() -> bool:
        await sweeper.step(keys.tag)
        return all([await redis.pttl(value) > 3_000_000 for value in values])

    await wait_until(all_are_kept, timeout_s=20)

    assert not any((await run(redis, control_scripts.sweep(keys))).keep)


@pytest.mark.fake
async def test_large_value_that_is_gone_stops_no_sweep(redis: Control, keys: DeploymentKeys, sweeper: Sweeper) -> None:
    await deploy_config(redis, keys)
    (ref,), delayed = await seed_queued(redis, keys), await seed_delayed(redis, keys)
    await redis.hset(keys.holds, ref, f"1 {keys.value(ref, '1-1')}")
    await age(redis, keys.due, delayed)

    await sweeper.step(keys.tag)

    assert await read_state(redis, keys, delayed) == State.QUEUED


@pytest.mark.fake
async def test_nothing_is_taken_over_before_a_full_lease_of_watching(
    redis: Control, settings: Settings, keys: DeploymentKeys, sweeper: Sweeper, clock: Clock
) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await register(redis, settings, keys)

    await watch(sweeper, clock, keys, LEASE_S - 0.1)
    before = await read_state(redis, keys, one.ref)
    clock.now_s += 0.1
    await sweeper.step(keys.tag)

    assert before == State.RUNNING
    assert await read_state(redis, keys, one.ref) == State.QUEUED
    assert not await redis.exists(keys.replicas)


@pytest.mark.fake
async def test_after_a_lease_of_watching_an_expired_lease_is_acted_on_at_once(
    redis: Control, keys: DeploymentKeys, sweeper: Sweeper, clock: Clock
) -> None:
    await deploy_config(redis, keys)
    await watch(sweeper, clock, keys, LEASE_S)
    (one,) = await seed_running(redis, keys)

    await sweeper.step(keys.tag)

    assert await read_state(redis, keys, one.ref) == State.QUEUED


@pytest.mark.fake
async def test_a_replica_with_a_lease_keeps_its_requests(
    redis: Control, keys: DeploymentKeys, sweeper: Sweeper, clock: Clock
) -> None:
    await deploy_config(redis, keys)
    await watch(sweeper, clock, keys, LEASE_S)
    (one,) = await seed_running(redis, keys)
    await run(redis, renew([keys.lease(REPLICA)], LEASE_S, "launcher"))

    await sweeper.step(keys.tag)

    assert await read_state(redis, keys, one.ref) == State.RUNNING


@pytest.mark.fake
async def test_break_of_our_own_connection_starts_the_watch_over(
    redis: Control, keys: DeploymentKeys, sweeper: Sweeper, clock: Clock
) -> None:
    await deploy_config(redis, keys)
    await watch(sweeper, clock, keys, LEASE_S)
    (one,) = await seed_running(redis, keys)

    sweeper.connection_was_broken()
    await sweeper.step(keys.tag)

    assert await read_state(redis, keys, one.ref) == State.RUNNING


@pytest.mark.fake
async def test_gap_by_the_servers_clock_starts_the_watch_over(
    redis: Control, settings: Settings, keys: DeploymentKeys, clock: Clock
) -> None:
    """A server that stood still, or a host that slept, has let all leases expire at once."""
    ahead_ms = 0

    async def run_then(call: Any) -> Any:
        answer = await run(redis, call)
        return replace(answer, now_ms=answer.now_ms + ahead_ms) if isinstance(answer, Swept) else answer

    sweeper = Sweeper(settings, run_then, redis.execute_command, clock=clock)
    await deploy_config(redis, keys)
    await sweeper.step(keys.tag)
    clock.now_s += LEASE_S
    (one,) = await seed_running(redis, keys)

    ahead_ms = int(LEASE_S * 500) + 100
    await sweeper.step(keys.tag)
    before = await read_state(redis, keys, one.ref)
    clock.now_s += LEASE_S
    await sweeper.step(keys.tag)

    assert (before, await read_state(redis, keys, one.ref)) == (State.RUNNING, State.QUEUED)


@pytest.mark.fake
async def test_burial_releases_every_lane_and_forgets_the_replica(
    redis: Control, settings: Settings, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    counts = {"high": 1, "normal": 101, "low": 2}
    refs = [one.ref for lane, count in counts.items() for one in await seed_running(redis, keys, count, lane=lane)]
    await register(redis, settings, keys)
    await run(redis, renew([keys.lease(REPLICA)], LEASE_S, "launcher"))
    supplier = Supplier(settings, lambda call: run(redis, call))

    requeued = [
        await bury(
            lambda call: run(redis, call),
            redis.execute_command,
            supplier,
            Signer(settings),
            keys,
            REPLICA,
            "killed",
            expired=False,
        )
        for _ in range(2)
    ]

    assert requeued == [104, 0]
    assert await read_states(redis, keys, refs) == [State.QUEUED] * 104
    assert not await redis.exists(keys.replicas, keys.lease(REPLICA))


async def test_burial_cuts_the_connections_of_the_dead_first(
    redis: Control, settings: Settings, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    ghost = await dial_everywhere(settings, "ghost", near=keys.prefix)
    read = ghost.ask("XREADGROUP", "GROUP", "replicas", REPLICA, "BLOCK", 0, "STREAMS", keys.lane("normal"), ">")
    await register(redis, settings, keys, ghost.client_id, 999_999_999)
    supplier = Supplier(settings, lambda call: run(redis, call))

    await bury(
        lambda call: run(redis, call), redis.execute_command, supplier, Signer(settings), keys, REPLICA, "frozen",
        expired=False,
    )  # fmt: skip

    await ghost.lost
    assert read.exception() is not None
