"""claim.lua: queued -> running."""

import pytest

from millstream.broker import scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import GROUP, DeploymentKeys
from millstream.broker.states import State
from millstream.errors import BrokerUnavailableError
from tests.helpers import claim, deploy_config, read_state, read_states, seed_queued, seed_running

pytestmark = [pytest.mark.anyio, pytest.mark.fake]


async def register(redis: Control, keys: DeploymentKeys, *replicas: str) -> None:
    await redis.hset(keys.replicas, mapping=dict.fromkeys(replicas, "{}"))


async def test_lanes_are_taken_in_order_and_each_from_its_head(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    low = await seed_queued(redis, keys, 2, lane="low")
    normal = await seed_queued(redis, keys, 2, lane="normal")
    high = await seed_queued(redis, keys, 2, lane="high")
    returned = await seed_queued(redis, keys, 2, lane="returned")

    claimed = await claim(redis, keys, 8)

    assert [one.ref for one in claimed] == returned + high + normal + low
    assert [one.lane for one in claimed] == ["returned"] * 2 + ["high"] * 2 + ["normal"] * 2 + ["low"] * 2


async def test_free_slots_are_counted_over_all_lanes(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    high = await seed_queued(redis, keys, 2, lane="high")
    normal = await seed_queued(redis, keys, 5, lane="normal")

    claimed = await claim(redis, keys, 4)

    assert [one.ref for one in claimed] == high + normal[:2]
    assert await read_states(redis, keys, normal[2:]) == [State.QUEUED] * 3


async def test_replica_without_free_slots_gets_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await seed_queued(redis, keys)

    assert await claim(redis, keys, 0) == []


async def test_empty_lanes_give_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)

    assert await claim(redis, keys, 5) == []


async def test_what_one_replica_took_no_other_gets(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    refs = await seed_queued(redis, keys, 4)

    first = await claim(redis, keys, 3, replica="r-1")
    second = await claim(redis, keys, 3, replica="r-2")

    assert [one.ref for one in first] == refs[:3]
    assert [one.ref for one in second] == refs[3:]


@pytest.mark.parametrize(("replicas", "waiting", "share"), [(1, 10, 10), (2, 10, 5), (2, 1, 1), (3, 10, 4), (4, 3, 1)])
async def test_replica_takes_at_most_its_share_of_what_waits(
    redis: Control, keys: DeploymentKeys, replicas: int, waiting: int, share: int
) -> None:
    await deploy_config(redis, keys)
    await register(redis, keys, *(f"r-{number}" for number in range(replicas)))
    await seed_queued(redis, keys, waiting)

    assert len(await claim(redis, keys, 100)) == share


async def test_share_is_of_all_lanes_and_does_not_count_what_runs(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await seed_running(redis, keys, 7, replica="r-2")
    await register(redis, keys, "r-1", "r-2")
    high = await seed_queued(redis, keys, 2, lane="high")
    low = await seed_queued(redis, keys, 4, lane="low")

    claimed = await claim(redis, keys, 100, replica="r-1")

    assert [one.ref for one in claimed] == high + low[:1]


async def test_claim_that_meets_a_lane_without_group_keeps_what_it_took(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (ref,) = await seed_queued(redis, keys, lane="normal")
    await redis.xgroup_destroy(keys.lane("low"), GROUP)

    claimed = await claim(redis, keys, 5)

    assert [one.ref for one in claimed] == [ref]


async def test_missing_group_is_reported_and_nothing_is_taken(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (ref,) = await seed_queued(redis, keys, lane="low")
    await redis.xgroup_destroy(keys.lane("normal"), GROUP)

    with pytest.raises(BrokerUnavailableError, match="lost this deployment's streams"):
        await run(redis, scripts.claim(keys, "r-1", 5))

    assert await read_state(redis, keys, ref) == State.QUEUED


@pytest.mark.parametrize(
    ("replicas", "waiting", "count", "direct"),
    [
        (0, 10, 10, 3),  # a full claim of one who is alone: it may read on as often as it asked to
        (1, 30, 10, 3),
        (1, 9, 10, 0),  # not full: the lane is empty now
        (2, 1000, 10, 3),
        (2, 49, 10, 1),  # 39 are left, and 20 go in each round of the two
        (2, 29, 10, 0),
    ],
)
async def test_deep_lane_may_be_read_directly_as_often_as_all_replicas_find_something(
    redis: Control, keys: DeploymentKeys, replicas: int, waiting: int, count: int, direct: int
) -> None:
    await deploy_config(redis, keys)
    if replicas:
        await register(redis, keys, *(f"r-{number}" for number in range(replicas)))
    await seed_queued(redis, keys, waiting)

    allowed, _ = await run(redis, scripts.claim(keys, "r-0", count, 3))

    assert allowed == direct


async def test_claim_from_several_lanes_allows_no_direct_reads(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await seed_queued(redis, keys, 5, lane="high")
    await seed_queued(redis, keys, 100, lane="normal")

    allowed, _ = await run(redis, scripts.claim(keys, "r-0", 10, 3))

    assert allowed == 0
