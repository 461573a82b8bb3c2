"""backlog.lua: one exact reading of a deployment."""

import pytest

from millstream.broker import control_scripts, scripts
from millstream.broker.connection import Control, run
from millstream.broker.control_scripts import Backlog
from millstream.broker.keys import GROUP, DeploymentKeys
from tests.helpers import (
    REPLICA,
    claim,
    deploy_config,
    finish,
    new_ref,
    seed_delayed,
    seed_parked,
    seed_queued,
    seed_running,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]


async def read(redis: Control, keys: DeploymentKeys) -> Backlog:
    return await run(redis, control_scripts.backlog(keys))


async def seed_old(redis: Control, keys: DeploymentKeys, age_ms: int, *, lane: str = "normal") -> str:
    """A queued request that was submitted `age_ms` ago, by the server's clock."""
    ref, (seconds, micros) = new_ref(), await redis.time()
    entry = f"{seconds * 1000 + micros // 1000 - age_ms}-0"
    await redis.xadd(keys.lane(lane), {"ref": ref, "method": "m", "reply": "", "body": ""}, id=entry)
    await redis.hset(keys.open, ref, f"{lane} {entry}")
    return ref


async def test_deployment_without_lanes_has_none(redis: Control, keys: DeploymentKeys) -> None:
    assert await read(redis, keys) == Backlog()


async def test_deployment_without_requests_has_none(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)

    assert await read(redis, keys) == Backlog()


async def test_every_request_is_counted_where_it_is(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await seed_running(redis, keys, 4, lane="low")
    for lane, count in (("high", 1), ("normal", 2), ("low", 3)):
        await seed_queued(redis, keys, count, lane=lane)
    await seed_parked(redis, keys)
    for delay_ms in (3_600_000, 3_600_000, 3_600_000):
        ref = await seed_delayed(redis, keys, delay_ms)
    await redis.zadd(keys.due, {ref: 1})

    backlog = await read(redis, keys)

    assert (backlog.waiting, backlog.in_flight, backlog.parked, backlog.delayed, backlog.due) == (6, 4, 1, 3, 1)


async def test_reading_stays_exact_when_requests_end_out_of_order(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    attempts = await seed_running(redis, keys, 10)
    await seed_queued(redis, keys, 5)

    await finish(redis, keys, *attempts[1::2])

    backlog = await read(redis, keys)
    assert (backlog.waiting, backlog.in_flight) == (5, 5)


async def test_reading_is_empty_when_all_have_ended(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await finish(redis, keys, *await seed_running(redis, keys, 10))

    backlog = await read(redis, keys)

    assert (backlog.waiting, backlog.in_flight, backlog.oldest_waiting_s) == (0, 0, None)


async def test_arrivals_count_every_request_ever_submitted(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await finish(redis, keys, *await seed_running(redis, keys, 3))
    await seed_queued(redis, keys, 2, lane="high")

    assert (await read(redis, keys)).arrivals == 5


async def test_returned_requests_wait_and_have_not_arrived_again(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await seed_running(redis, keys, 3)

    await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))

    backlog = await read(redis, keys)
    assert (backlog.waiting, backlog.in_flight, backlog.arrivals) == (3, 0, 3)


async def test_age_is_that_of_the_oldest_waiting_in_any_lane(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await seed_old(redis, keys, 5_000, lane="normal")
    await seed_old(redis, keys, 60_000, lane="low")

    age_s = (await read(redis, keys)).oldest_waiting_s

    assert age_s is not None and 60.0 <= age_s < 63.0


async def test_age_does_not_count_what_runs(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await seed_old(redis, keys, 60_000)
    await claim(redis, keys)
    await seed_old(redis, keys, 5_000)

    age_s = (await read(redis, keys)).oldest_waiting_s

    assert age_s is not None and 5.0 <= age_s < 8.0


async def test_age_is_unknown_when_nothing_waits(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await seed_running(redis, keys)

    assert (await read(redis, keys)).oldest_waiting_s is None


async def test_lane_that_lost_its_group_waits_as_a_whole(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await seed_running(redis, keys, 2)
    await seed_queued(redis, keys, 1)

    await redis.xgroup_destroy(keys.lane("normal"), GROUP)

    backlog = await read(redis, keys)
    assert (backlog.waiting, backlog.in_flight) == (3, 0)
    assert backlog.oldest_waiting_s is not None


async def test_last_ids_tell_a_reader_where_to_go_on(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    *_, last = await seed_running(redis, keys, 3, lane="low")
    await finish(redis, keys, last)

    assert (await read(redis, keys)).last_ids == ("0-0", "0-0", "0-0", last.entry.decode())
