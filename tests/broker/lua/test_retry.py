"""retry.lua: what raised waits for its next attempt; what dies is counted apart."""

import json

import pytest
from redis.exceptions import ResponseError

from millstream.broker import control_scripts, scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.states import State
from tests.helpers import (
    REPLICA,
    Claimed,
    age,
    asking,
    cancel,
    claim,
    deploy_config,
    now_ms,
    read_everything,
    read_held,
    read_result,
    read_state,
    seed_parked,
    seed_running,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]

ENDING = {"replica": REPLICA, "cause": "raised ValueError: no"}


async def retry(redis: Control, keys: DeploymentKeys, *attempts: Claimed, delay_ms: int = 1000) -> list[int]:
    failures = [part for one in attempts for part in (one.entry, one.ref, delay_ms, json.dumps(ENDING))]
    return await run(redis, scripts.retry(keys, attempts[0].lane, failures))


async def take_again(redis: Control, keys: DeploymentKeys, ref: str, replica: str = REPLICA) -> Claimed:
    """Let its pause be over, and claim it."""
    await age(redis, keys.due, ref)
    await run(redis, control_scripts.sweep(keys))
    (one,) = await claim(redis, keys, replica=replica)
    assert one.ref == ref
    return one


async def test_request_waits_for_its_time_and_comes_back_as_it_was(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys, lane="low", extras=asking(kill=1, timeout_ms=60_000))
    before_ms = await now_ms(redis)

    assert await retry(redis, keys, one) == []

    held = await read_held(redis, keys, one.ref)
    assert await read_state(redis, keys, one.ref) == State.DELAYED
    assert before_ms + 1000 <= held.due_ms <= await now_ms(redis) + 1000
    assert await redis.zscore(keys.due, one.ref) == held.due_ms
    assert await redis.zscore(keys.deadlines, one.ref) is not None
    again = await take_again(redis, keys, one.ref)
    (failure,) = json.loads(again.fields.pop(b"history"))
    assert again.lane == "low"
    assert again.fields == one.fields | {b"attempt": b"2", b"retries": b"1"}
    assert before_ms <= failure.pop("at_ms") <= await now_ms(redis)
    assert failure == ENDING | {"attempt": 1}


async def test_values_that_it_has_got_stay(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref, upstream = await seed_parked(redis, keys, "up.Up~" + "u" * 22), "up.Up~" + "u" * 22
    await run(redis, scripts.supply(keys, ref, upstream, b"succeeded normal 1-1\nvalue"))
    (one,) = await claim(redis, keys)

    await retry(redis, keys, one)

    again = await take_again(redis, keys, ref)
    assert again.fields[f"dep:{upstream}".encode()] == b"succeeded normal 1-1\nvalue"


async def test_repeated_retry_changes_nothing_and_is_told_so(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    attempts = await seed_running(redis, keys, 3)
    await retry(redis, keys, *attempts[:2])
    before = await read_everything(redis)

    assert await retry(redis, keys, *attempts[:2]) == [0, 1]
    assert await read_everything(redis) == before
    assert await retry(redis, keys, *attempts) == [0, 1]
    assert await read_state(redis, keys, attempts[2].ref) == State.DELAYED


async def test_late_owner_is_refused(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))
    (again,) = await claim(redis, keys, replica="r-2")

    assert await retry(redis, keys, one) == [0]
    assert await read_state(redis, keys, one.ref) == State.RUNNING
    assert again.fields[b"attempt"] == b"2"


async def test_it_can_be_cancelled_meanwhile(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await retry(redis, keys, one)

    await cancel(redis, keys, one.ref)

    result = await read_result(redis, keys, one.ref)
    assert result == ("cancelled - -", b"why not")


async def test_returned_request_comes_back_in_its_own_lane(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys, lane="high")
    await run(redis, scripts.release(keys, "high", REPLICA, "killed", expired=False))
    (again,) = await claim(redis, keys)
    assert again.lane == "returned"

    await retry(redis, keys, again)

    third = await take_again(redis, keys, one.ref)
    assert (third.lane, third.fields[b"attempt"], third.fields[b"retries"]) == ("high", b"3", b"1")
    assert [ended["cause"] for ended in json.loads(third.fields[b"history"])] == ["killed", ENDING["cause"]]


async def test_deaths_are_counted_apart(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys, max_attempts=2)
    (one,) = await seed_running(redis, keys)
    await retry(redis, keys, one)
    again = await take_again(redis, keys, one.ref)
    await retry(redis, keys, again)
    await take_again(redis, keys, one.ref)

    first = await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))
    await claim(redis, keys, replica="r-2")
    second = await run(redis, scripts.release(keys, "returned", "r-2", "killed", expired=False))

    assert (first.requeued, first.buried) == (1, 0)
    assert (second.requeued, second.buried) == (0, 1)
    result = await read_result(redis, keys, one.ref)
    assert result is not None
    assert [ended["attempt"] for ended in json.loads(result[1])] == [1, 2, 3, 4]


async def test_arguments_that_make_no_sense_are_refused_before_anything_is_written(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    before = await read_everything(redis)

    with pytest.raises(ResponseError, match="BADREQUEST four arguments"):
        await run(redis, scripts.retry(keys, "normal", [one.entry, one.ref, 5]))
    assert await read_everything(redis) == before


async def test_attempt_that_did_not_begin_is_none(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)

    assert await run(redis, scripts.retry(keys, "normal", [one.entry, one.ref, 200, ""])) == []

    assert await read_state(redis, keys, one.ref) == State.DELAYED
    again = await take_again(redis, keys, one.ref)
    assert again.fields == one.fields
