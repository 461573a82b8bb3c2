"""sweep.lua: what is due is queued; what is stuck or without a lease is named."""

from typing import Any

import pytest

from millstream.broker import control_scripts, scripts
from millstream.broker.connection import Control, run
from millstream.broker.control_scripts import Swept
from millstream.broker.keys import LANES, DeploymentKeys
from millstream.broker.scripts import REPAIR_AFTER_MS, SWEEP_LIMIT
from millstream.broker.states import State
from tests.helpers import (
    age,
    claim,
    deploy_config,
    now_ms,
    read_everything,
    read_state,
    seed_delayed,
    seed_parked,
    seed_queued,
    seed_running,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]

A, B, C = ("up.Up~" + letter * 22 for letter in "abc")


async def sweep(redis: Control, keys: DeploymentKeys) -> Swept:
    return await run(redis, control_scripts.sweep(keys))


async def test_nothing_to_do_writes_nothing(redis: Control, keys: DeploymentKeys) -> None:
    before_deployment = await sweep(redis, keys)
    await deploy_config(redis, keys)
    await seed_queued(redis, keys)
    before = await read_everything(redis)

    nothing = Swept(promoted=0, stuck=[], without_lease=[], overdue=[], keep=[], holds_cursor=b"0")
    assert await sweep(redis, keys) == before_deployment == nothing
    assert await read_everything(redis) == before


async def test_due_request_is_queued_in_its_lane(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    due, later = await seed_delayed(redis, keys, lane="high"), await seed_delayed(redis, keys)
    await age(redis, keys.due, due)

    swept = await sweep(redis, keys)

    (one,) = await claim(redis, keys, 5)
    assert swept.promoted == 1
    assert (one.ref, one.lane) == (due, "high")
    assert one.fields.keys() == {b"ref", b"method", b"reply", b"body"}
    assert await read_state(redis, keys, later) == State.DELAYED


async def test_delay_of_a_millisecond_is_over_soon(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = await seed_delayed(redis, keys, 1)

    while (await sweep(redis, keys)).promoted == 0:
        pass

    assert await read_state(redis, keys, ref) == State.QUEUED


async def test_one_sweep_is_bounded(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    refs = [await seed_delayed(redis, keys) for _ in range(SWEEP_LIMIT + 20)]
    await age(redis, keys.due, *refs)

    promoted = [(await sweep(redis, keys)).promoted for _ in range(3)]

    assert promoted == [SWEEP_LIMIT, 20, 0]


async def test_parked_request_is_named_with_what_it_misses(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = await seed_parked(redis, keys, A, B, C)
    await run(redis, scripts.supply(keys, ref, B, b"value"))
    await age(redis, keys.parked, ref)

    (row,) = (await sweep(redis, keys)).stuck

    assert (row[0], sorted(row[1])) == (ref.encode(), [A, C])


async def test_parked_request_is_looked_after_at_intervals(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = await seed_parked(redis, keys, A)

    at_once = await sweep(redis, keys)
    await age(redis, keys.parked, ref)
    in_time = await sweep(redis, keys)
    again_at_once = await sweep(redis, keys)

    assert [len(swept.stuck) for swept in (at_once, in_time, again_at_once)] == [0, 1, 0]
    next_ms: Any = await redis.zscore(keys.parked, ref)
    assert 0 < next_ms - await now_ms(redis) <= REPAIR_AFTER_MS


async def test_requests_that_wait_for_very_much_are_looked_after_a_few_at_a_time(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    upstream = [f"up.Up~{number:022d}" for number in range(300)]
    refs = [await seed_parked(redis, keys, *upstream) for _ in range(5)]
    await age(redis, keys.parked, *refs)

    rows = [(await sweep(redis, keys)).stuck for _ in range(4)]

    assert [len(stuck) for stuck in rows] == [2, 2, 1, 0]
    assert {row[0].decode() for stuck in rows for row in stuck} == set(refs)
    assert {len(row[1]) for stuck in rows for row in stuck} == {300}


async def test_registered_replica_without_lease_is_named(redis: Control, keys: DeploymentKeys) -> None:
    await redis.hset(keys.config, "max_attempts", 3)
    await redis.hset(keys.replicas, mapping={"dead": "{}", "alive": "{}"})
    await run(redis, control_scripts.renew([keys.lease("alive")], 10, "launcher"))

    assert (await sweep(redis, keys)).without_lease == ["dead"]


@pytest.mark.parametrize("lane", LANES)
async def test_consumer_that_is_not_registered_is_named(redis: Control, keys: DeploymentKeys, lane: str) -> None:
    await deploy_config(redis, keys)
    await seed_running(redis, keys, lane=lane, replica="ghost")
    await seed_running(redis, keys, lane=lane, replica="alive")
    await run(redis, control_scripts.renew([keys.lease("alive")], 10, "launcher"))

    assert (await sweep(redis, keys)).without_lease == ["ghost"]


async def test_replica_is_named_once(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await redis.hset(keys.replicas, "dead", "{}")
    for lane in LANES:
        await seed_running(redis, keys, lane=lane, replica="dead")

    assert (await sweep(redis, keys)).without_lease == ["dead"]
