"""hand_back.lua: what a living replica took and did not start goes back; that is not an attempt."""

import pytest

from millstream.broker import scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.states import State
from tests.helpers import (
    REPLICA,
    Claimed,
    claim,
    deploy_config,
    finish,
    read_everything,
    read_states,
    seed_running,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]


async def hand_back(redis: Control, keys: DeploymentKeys, *attempts: Claimed, target: str = "") -> int:
    lane = attempts[0].lane
    return await run(redis, scripts.hand_back(keys, lane, target or lane, [one.entry for one in attempts]))


@pytest.mark.parametrize("lane", ["high", "normal", "low"])
async def test_request_goes_back_to_its_lane_as_it_was(redis: Control, keys: DeploymentKeys, lane: str) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys, lane=lane)

    count = await hand_back(redis, keys, one)

    (again,) = await claim(redis, keys, replica="r-2")
    assert count == 1
    assert (again.ref, again.lane, again.fields) == (one.ref, lane, one.fields)
    assert again.entry != one.entry


async def test_returned_request_keeps_its_attempt_and_history(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await seed_running(redis, keys)
    await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))
    (second,) = await claim(redis, keys, replica="r-2")

    await hand_back(redis, keys, second)

    (again,) = await claim(redis, keys, replica="r-3")
    assert (again.lane, again.fields) == ("returned", second.fields)


async def test_several_go_back_and_the_rest_runs_on(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    first, second, third = await seed_running(redis, keys, 3)

    count = await hand_back(redis, keys, first, third)

    assert count == 2
    states = await read_states(redis, keys, [first.ref, second.ref, third.ref])
    assert states == [State.QUEUED, State.RUNNING, State.QUEUED]


async def test_repeated_hand_back_changes_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await hand_back(redis, keys, one)
    before = await read_everything(redis)

    assert await hand_back(redis, keys, one) == 0
    assert await read_everything(redis) == before


async def test_what_has_ended_or_was_taken_over_is_not_handed_back(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (ended,) = await seed_running(redis, keys)
    await finish(redis, keys, ended)
    (released,) = await seed_running(redis, keys)
    await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))
    before = await read_everything(redis)

    assert await hand_back(redis, keys, ended, released) == 0
    assert await read_everything(redis) == before
