"""Large values, which lie in keys of their own, and the life of results: finish.lua and ending.lua."""

from typing import Any

import pytest

from millstream.broker import scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.scripts import Finished
from millstream.broker.states import State
from tests.helpers import (
    REPLICA,
    Claimed,
    cancel,
    claim,
    deploy_config,
    finish,
    now_ms,
    open_inbox,
    read_everything,
    read_result,
    read_state,
    read_states,
    seed_running,
    wait_until,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]

TTL_MS = 600_000


async def write_value(redis: Control, keys: DeploymentKeys, one: Claimed) -> None:
    """As a replica does before it finishes, each time."""
    await redis.set(keys.value(one.ref, one.entry.decode()), b"a large value", px=TTL_MS)


# large values


@pytest.mark.parametrize("ttl_s", [1, 59, 7200])
async def test_large_value_lives_at_least_as_long_as_its_result(
    redis: Control, keys: DeploymentKeys, ttl_s: int
) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await write_value(redis, keys, one)
    await run(redis, scripts.watch(keys, "waiters", "app.B~b", [one.ref]))

    answer, _ = await finish(redis, keys, one, value=b"@13", ttl_s=ttl_s)

    value_ms = await redis.pttl(keys.value(one.ref, one.entry.decode()))
    assert answer == {}
    assert await read_result(redis, keys, one.ref) == (f"succeeded normal {one.entry.decode()}", b"@13")
    assert ttl_s * 1000 - 1000 < await redis.pttl(keys.result(one.ref)) <= value_ms + 20


async def test_caller_is_told_where_a_large_value_is(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await write_value(redis, keys, one)
    async with open_inbox(redis, keys) as inbox:
        await finish(redis, keys, one, value=b"@13")

        assert await inbox.take() == {one.ref: b"succeeded normal " + one.entry + b"\n@13"}


async def test_finish_without_its_large_value_is_refused_until_it_is_written_again(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    gone, other = await seed_running(redis, keys, 2)

    first, _ = await finish(redis, keys, gone, other, value=b"@13")
    states = await read_states(redis, keys, [gone.ref, other.ref])
    for one in (gone, other):
        await write_value(redis, keys, one)
    second, _ = await finish(redis, keys, gone, other, value=b"@13")

    assert (first, second) == ({0: Finished.MISSING, 1: Finished.MISSING}, {})
    assert states == [State.RUNNING] * 2
    assert await read_states(redis, keys, [gone.ref, other.ref]) == [State.SUCCEEDED] * 2


async def test_missing_value_stops_no_other_of_its_batch(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    small, large, failed = await seed_running(redis, keys, 3)

    outcomes = [
        *(small.entry, small.ref, "", "succeeded", b"a value"),
        *(large.entry, large.ref, "", "succeeded", b"@13"),
        *(failed.entry, failed.ref, "", "failed", b"an error"),
    ]
    refused, _ = await run(redis, scripts.finish(keys, "normal", 60, outcomes))

    assert refused == {1: Finished.MISSING}
    states = await read_states(redis, keys, [small.ref, large.ref, failed.ref])
    assert states == [State.SUCCEEDED, State.RUNNING, State.FAILED]


async def test_large_value_of_another_attempt_is_not_this_ones(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (late,) = await seed_running(redis, keys)
    await write_value(redis, keys, late)

    async def is_later() -> bool:  # within a millisecond, two lanes give the same entry id
        return await now_ms(redis) > int(late.entry.partition(b"-")[0])

    await wait_until(is_later)
    await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))
    (second,) = await claim(redis, keys, replica="r-2")

    refused = [(await finish(redis, keys, one, value=b"@13"))[0] for one in (late, second)]

    assert refused == [{0: Finished.STALE}, {0: Finished.MISSING}]
    assert 0 < await redis.pttl(keys.value(late.ref, late.entry.decode())) <= TTL_MS


@pytest.mark.parametrize("value", [b"@13", b"@14", b"a small value"])
async def test_finish_repeated_after_its_large_value_has_expired_is_told_done(
    redis: Control, keys: DeploymentKeys, value: bytes
) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await write_value(redis, keys, one)
    await finish(redis, keys, one, value=b"@13")
    await redis.delete(keys.value(one.ref, one.entry.decode()))

    refused, _ = await finish(redis, keys, one, value=value)

    assert refused == {0: Finished.DONE}
    assert await read_result(redis, keys, one.ref) == (f"succeeded normal {one.entry.decode()}", b"@13")


async def test_finish_of_a_cancelled_request_is_told_so_whether_its_value_is_there_or_not(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await cancel(redis, keys, one.ref)

    without, _ = await finish(redis, keys, one, value=b"@13")
    await write_value(redis, keys, one)
    with_it, _ = await finish(redis, keys, one, value=b"@13")

    assert without == with_it == {0: Finished.ENDED}
    assert await read_state(redis, keys, one.ref) == State.CANCELLED


@pytest.mark.parametrize("value", [b"", b"\x01p@", b"an @"])
async def test_only_a_value_that_begins_with_the_sign_lies_elsewhere(
    redis: Control, keys: DeploymentKeys, value: bytes
) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)

    assert await finish(redis, keys, one, value=value) == ({}, [])


# results that somebody waits for


@pytest.mark.parametrize(("how", "least_ms"), [("waiters", 59_000), ("readers", 0), ("", 0)])
async def test_result_that_others_wait_for_lives_long_enough_to_be_supplied_by_a_sweeper(
    redis: Control, keys: DeploymentKeys, how: str, least_ms: int
) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await run(redis, scripts.watch(keys, how, "app.B~b", [one.ref]))

    await finish(redis, keys, one, ttl_s=1)

    left_ms = await redis.pttl(keys.result(one.ref))
    assert least_ms < left_ms <= (60_000 if least_ms else 1000)


@pytest.mark.parametrize("ttl_s", ["soon", ""])
async def test_time_to_live_that_is_no_number_writes_nothing(redis: Control, keys: DeploymentKeys, ttl_s: Any) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    before = await read_everything(redis)

    with pytest.raises(Exception, match="ceil"):
        await finish(redis, keys, one, ttl_s=ttl_s)

    assert await read_everything(redis) == before


@pytest.mark.parametrize("ttl_s", [0, -1, 0.2])
async def test_time_to_live_is_a_second_at_least(redis: Control, keys: DeploymentKeys, ttl_s: Any) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)

    await finish(redis, keys, one, ttl_s=ttl_s)

    assert 0 < await redis.pttl(keys.result(one.ref)) <= 1000
