"""Large arguments and values, which lie in keys of their own: when they must be there, and when they go."""

from typing import Any

import pytest

from millstream.broker import scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.scripts import Finished, Submitted, Supplied
from millstream.broker.states import State
from tests.helpers import (
    BODY,
    CALLER,
    REPLICA,
    Claimed,
    age,
    asking,
    cancel,
    claim,
    deploy_config,
    finish,
    new_ref,
    open_inbox,
    read_everything,
    read_result,
    read_state,
    read_states,
    request,
    seed_running,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]

A = "up.A~" + "a" * 22
TTL_MS = 600_000
WITH_PAYLOAD = asking(payload=True, timeout_ms=3_600_000)
WEEK_MS = 7 * 24 * 3_600_000


async def write_payload(redis: Control, keys: DeploymentKeys, ref: str) -> None:
    """As a caller does before it submits, each time."""
    await redis.set(keys.payload(ref), b"large arguments", px=TTL_MS)


async def write_value(redis: Control, keys: DeploymentKeys, one: Claimed) -> None:
    """As a replica does before it finishes, each time."""
    await redis.set(keys.value(one.ref, one.entry.decode()), b"a large value", px=TTL_MS)


async def submit(redis: Control, keys: DeploymentKeys, ref: str) -> Submitted:
    answers = await run(redis, scripts.submit(keys, CALLER, request(ref, extras=WITH_PAYLOAD, body=b"")))
    return answers.get(0, Submitted.NEW)


async def hold(redis: Control, keys: DeploymentKeys, ref: str, *depends_on: str) -> Submitted:
    call = scripts.hold(
        keys, CALLER, ref.encode(), "low", b"m", BODY,
        extras=WITH_PAYLOAD.encode(), delay_ms=3_600_000, depends_on=depends_on,
    )  # fmt: skip
    return await run(redis, call)


async def seed_with_payload(redis: Control, keys: DeploymentKeys) -> Claimed:
    """A running request with large arguments."""
    ref = new_ref()
    await write_payload(redis, keys, ref)
    assert await submit(redis, keys, ref) == Submitted.NEW
    (one,) = await claim(redis, keys)
    return one


BOTH = pytest.mark.parametrize("send", [submit, hold])


# arguments on their way in


@BOTH
async def test_arguments_that_are_there_stay_for_as_long_as_the_request(
    redis: Control, keys: DeploymentKeys, send: Any
) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()
    await write_payload(redis, keys, ref)

    answer = await send(redis, keys, ref)

    assert answer == Submitted.NEW
    assert await redis.pttl(keys.payload(ref)) == -1
    assert await redis.hget(keys.notes, f"{ref}:payload") == b"1"


async def test_request_says_where_its_arguments_are(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)

    one = await seed_with_payload(redis, keys)

    assert (one.fields[b"payload"], one.fields[b"body"]) == (b"1", b"")


@BOTH
async def test_without_its_arguments_a_request_is_not_taken_in_and_nothing_is_written(
    redis: Control, keys: DeploymentKeys, send: Any
) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()
    before = await read_everything(redis)

    first = await send(redis, keys, ref)
    unchanged = await read_everything(redis) == before
    await write_payload(redis, keys, ref)
    second = await send(redis, keys, ref)

    assert (first, unchanged, second) == (Submitted.MISSING, True, Submitted.NEW)


async def test_others_of_the_batch_are_taken_in(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    refs = [new_ref() for _ in range(3)]

    batch = request(refs[0]) + request(refs[1], extras=asking(payload=True)) + request(refs[2])
    answers = await run(redis, scripts.submit(keys, CALLER, batch))

    assert answers == {1: Submitted.MISSING}
    assert await read_states(redis, keys, refs) == [State.QUEUED, None, State.QUEUED]


async def test_caller_that_dies_before_it_submits_leaves_its_arguments_to_their_ttl(
    redis: Control, keys: DeploymentKeys
) -> None:
    ref = new_ref()

    await write_payload(redis, keys, ref)

    assert 0 < await redis.pttl(keys.payload(ref)) <= TTL_MS


@BOTH
async def test_caller_that_sends_again_does_not_give_an_end_to_what_the_request_still_needs(
    redis: Control, keys: DeploymentKeys, send: Any
) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()
    await write_payload(redis, keys, ref)
    await send(redis, keys, ref)  # its reply gets lost
    before = await read_everything(redis)

    await write_payload(redis, keys, ref)
    answer = await send(redis, keys, ref)

    assert answer == Submitted.OPEN
    assert await redis.pttl(keys.payload(ref)) == -1
    assert await read_everything(redis) == before


@BOTH
async def test_arguments_sent_again_after_the_end_are_left_to_their_ttl(
    redis: Control, keys: DeploymentKeys, send: Any
) -> None:
    await deploy_config(redis, keys)
    one = await seed_with_payload(redis, keys)
    await finish(redis, keys, one)

    await write_payload(redis, keys, one.ref)
    answer = await send(redis, keys, one.ref)

    assert answer == Submitted.DONE
    assert 0 < await redis.pttl(keys.payload(one.ref)) <= TTL_MS


async def test_arguments_of_somebody_else_for_a_request_that_has_none_are_left_to_their_ttl(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)

    await write_payload(redis, keys, one.ref)
    answer = await submit(redis, keys, one.ref)

    assert answer == Submitted.OPEN
    assert 0 < await redis.pttl(keys.payload(one.ref)) <= TTL_MS


# arguments at the end


async def end(redis: Control, keys: DeploymentKeys, how: str) -> str:
    """Bring a request with large arguments to a terminal state; its ref."""
    ref = new_ref()
    if how in ("reject", "cancel parked", "cancel delayed"):
        await write_payload(redis, keys, ref)
        await hold(redis, keys, ref, *(() if how == "cancel delayed" else (A,)))
    else:
        ref = (await seed_with_payload(redis, keys)).ref
    place: Any = await redis.hget(keys.open, ref)
    one = Claimed(ref, "normal", place.rpartition(b" ")[2], {})
    match how:
        case "succeeded" | "failed":
            await finish(redis, keys, one, state=how)
        case "reject":
            await run(redis, scripts.reject(keys, ref, 60, b"error"))
        case "expire":
            await age(redis, keys.deadlines, ref)
            await cancel(redis, keys, ref, overdue=True)
        case "discard":
            await run(redis, scripts.discard(keys, "0", 60, "deleted", running=True))
        case "cancel queued":
            await run(redis, scripts.hand_back(keys, "normal", "normal", [one.entry]))
            await cancel(redis, keys, ref)
        case "bury":
            await redis.hset(keys.config, "max_attempts", 1)
            await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))
        case _:
            await cancel(redis, keys, ref)
    return ref


@pytest.mark.parametrize(
    "how",
    [
        "succeeded", "failed", "reject", "cancel parked", "cancel delayed", "cancel queued", "cancel running",
        "expire", "discard",
    ],
)  # fmt: skip
async def test_arguments_go_with_the_end_of_the_request(redis: Control, keys: DeploymentKeys, how: str) -> None:
    await deploy_config(redis, keys)

    ref = await end(redis, keys, how)

    assert await redis.exists(keys.result(ref))
    assert not await redis.exists(keys.payload(ref), keys.notes, keys.deadlines, keys.open)


async def test_arguments_of_a_dead_letter_are_kept_for_a_week(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)

    ref = await end(redis, keys, "bury")

    letters: Any = await redis.xrange(keys.dead)
    assert letters[0][1][b"payload"] == b"1"
    assert WEEK_MS - 60_000 < await redis.pttl(keys.payload(ref)) <= WEEK_MS
    assert not await redis.exists(keys.notes, keys.deadlines, keys.open)


async def test_arguments_stay_through_hand_back_takeover_supply_and_promotion(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    handed_back = await seed_with_payload(redis, keys)
    await run(redis, scripts.hand_back(keys, "normal", "normal", [handed_back.entry]))
    await claim(redis, keys)
    await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))
    ref = new_ref()
    await write_payload(redis, keys, ref)
    await hold(redis, keys, ref, A)
    supplied = await run(redis, scripts.supply(keys, ref, A, b"value"))
    await age(redis, keys.due, ref)
    await run(redis, scripts.wake(keys))

    attempts = await claim(redis, keys, 5)

    assert supplied == Supplied.DELAYED
    assert [(one.ref, one.fields[b"payload"]) for one in attempts] == [(handed_back.ref, b"1"), (ref, b"1")]
    assert [await redis.pttl(keys.payload(one.ref)) for one in attempts] == [-1, -1]


# values


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
    one = await seed_with_payload(redis, keys)
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
