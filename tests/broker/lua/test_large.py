"""Large arguments, which lie in a key of their own: when they must be there, and when they go."""

from typing import Any

import pytest

from millstream.broker import scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.scripts import Submitted, Supplied
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
    read_everything,
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
