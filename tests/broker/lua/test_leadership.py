"""lead.lua, decide.lua and renew.lua: who decides, what was decided, and who lives."""

from typing import Any

import pytest

from millstream.broker import control_scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys, Keys
from tests.helpers import deploy_config, read_everything

pytestmark = [pytest.mark.anyio, pytest.mark.fake]

ALL = Keys("ms")


async def lead(redis: Control, autoscaler: str) -> int:
    return await run(redis, control_scripts.lead(ALL, autoscaler, 10))


async def decide(redis: Control, keys: DeploymentKeys, fence: int, target: int) -> str:
    return await run(
        redis, control_scripts.decide(keys, fence, target, "backlog grows", {"waiting": 7, "in_flight": 2})
    )


# lead


async def test_first_to_ask_leads_and_stays_leader_under_one_number(redis: Control) -> None:
    assert [await lead(redis, "a-1"), await lead(redis, "a-1"), await lead(redis, "a-1")] == [1, 1, 1]


async def test_nobody_else_leads_meanwhile(redis: Control) -> None:
    await lead(redis, "a-1")

    assert await lead(redis, "a-2") == 0
    assert await lead(redis, "a-1") == 1


async def test_next_leader_has_a_higher_number(redis: Control) -> None:
    first = await lead(redis, "a-1")
    await redis.pexpire(ALL.leader, 0)

    second = await lead(redis, "a-2")

    assert second > first
    assert await lead(redis, "a-1") == 0


async def test_leader_that_lost_its_lease_comes_back_under_a_new_number(redis: Control) -> None:
    first = await lead(redis, "a-1")
    await redis.pexpire(ALL.leader, 0)

    assert await lead(redis, "a-1") > first


async def test_asking_again_renews_the_lease(redis: Control) -> None:
    await lead(redis, "a-1")
    await redis.pexpire(ALL.leader, 5_000)

    await lead(redis, "a-1")

    assert await redis.pttl(ALL.leader) > 5_000


# decide


async def test_decision_is_written_and_on_record(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)

    answer = await decide(redis, keys, fence=1, target=4)

    records: Any = await redis.xrange(keys.scaling)
    assert answer == "decided"
    assert await redis.hgetall(keys.status) == {b"fence": b"1", b"target": b"4", b"reason": b"backlog grows"}
    assert [fields for _, fields in records] == [
        {b"target": b"4", b"reason": b"backlog grows", b"waiting": b"7", b"in_flight": b"2"}
    ]


async def test_former_leader_is_fenced_and_changes_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await decide(redis, keys, fence=10, target=4)
    before = await read_everything(redis)

    assert await decide(redis, keys, fence=9, target=1) == "fenced"
    assert await read_everything(redis) == before


async def test_same_and_later_leaders_may_decide_again(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)

    answers = [await decide(redis, keys, fence, target=fence) for fence in (9, 9, 10)]

    assert answers == ["decided"] * 3
    assert await redis.hget(keys.status, "target") == b"10"


async def test_nothing_is_decided_for_a_deployment_that_is_gone(redis: Control, keys: DeploymentKeys) -> None:
    assert await decide(redis, keys, fence=1, target=4) == "gone"
    assert await read_everything(redis) == {}


# renew


async def test_renewed_leases_end_by_themselves(redis: Control, keys: DeploymentKeys) -> None:
    leases = [keys.lease("r-1"), keys.lease("r-2")]

    assert await run(redis, control_scripts.renew(leases, 0.5, "launcher")) == 2
    assert [0 < await redis.pttl(lease) <= 500 for lease in leases] == [True, True]


async def test_lease_that_has_ended_is_revived(redis: Control, keys: DeploymentKeys) -> None:
    lease = keys.lease("r-1")
    await run(redis, control_scripts.renew([lease], 10, "launcher"))
    await redis.pexpire(lease, 0)

    await run(redis, control_scripts.renew([lease], 10, "launcher"))

    assert await redis.get(lease) == b"launcher"
