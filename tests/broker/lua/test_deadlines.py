"""Deadlines: set by submit.lua and hold.lua, found by sweep.lua, carried out by cancel.lua on the server's clock."""

from typing import Any

import pytest

from millstream.broker import control_scripts, scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.outcomes import OVERDUE
from millstream.broker.scripts import SWEEP_LIMIT, Ended, Finished, Supplied, Waiter
from millstream.broker.states import State
from tests.helpers import (
    BODY,
    CALLER,
    REPLICA,
    age,
    asking,
    cancel,
    claim,
    deploy_config,
    finish,
    new_ref,
    now_ms,
    open_inbox,
    open_orders,
    read_everything,
    read_result,
    read_state,
    request,
    seed_delayed,
    seed_parked,
    seed_queued,
    seed_running,
    wait_until,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]

A = "up.A~" + "a" * 22
HOUR_MS = 3_600_000
IN_AN_HOUR = asking(timeout_ms=HOUR_MS)


async def deadline_of(redis: Control, keys: DeploymentKeys, ref: str) -> int | None:
    score: Any = await redis.zscore(keys.deadlines, ref)
    return None if score is None else int(score)


# set


@pytest.mark.parametrize("how", ["queued", "parked", "delayed"])
async def test_deadline_counts_from_the_submission_on_the_clock_of_the_server(
    redis: Control, keys: DeploymentKeys, how: str
) -> None:
    await deploy_config(redis, keys)
    before_ms = await now_ms(redis)

    match how:
        case "queued":
            (ref,) = await seed_queued(redis, keys, extras=IN_AN_HOUR)
        case "parked":
            ref = await seed_parked(redis, keys, extras=IN_AN_HOUR)
        case _:
            ref = await seed_delayed(redis, keys, extras=IN_AN_HOUR)

    deadline_ms = await deadline_of(redis, keys, ref)
    assert deadline_ms is not None
    assert before_ms + HOUR_MS <= deadline_ms <= await now_ms(redis) + HOUR_MS


async def test_deadline_travels_with_the_request(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)

    (one,) = await seed_running(redis, keys, extras=IN_AN_HOUR)

    assert int(one.fields[b"deadline"]) == await deadline_of(redis, keys, one.ref)


async def test_deployment_may_set_a_timeout_for_all_and_each_request_its_own(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys, timeout_ms=HOUR_MS)
    (default,) = await seed_queued(redis, keys)
    (own,) = await seed_queued(redis, keys, extras=asking(timeout_ms=1000, want="matched"))
    parked, delayed = await seed_parked(redis, keys), await seed_delayed(redis, keys, extras=asking(timeout_ms=1000))
    at_ms = await now_ms(redis)

    left_s = [round(((await deadline_of(redis, keys, ref) or 0) - at_ms) / 1000) for ref in (default, own)]
    left_s += [round(((await deadline_of(redis, keys, ref) or 0) - at_ms) / 1000) for ref in (parked, delayed)]

    assert left_s == [3600, 1, 3600, 1]


async def test_without_a_timeout_there_is_no_deadline(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await seed_queued(redis, keys)
    await seed_parked(redis, keys)

    assert not await redis.exists(keys.deadlines)


async def test_repeated_submit_does_not_start_the_time_anew(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (ref,) = await seed_queued(redis, keys, extras=IN_AN_HOUR)
    parked = await seed_parked(redis, keys, A, extras=IN_AN_HOUR)
    before = await read_everything(redis)

    much_later = asking(timeout_ms=10 * HOUR_MS)
    await run(redis, scripts.submit(keys, CALLER, request(ref, extras=much_later)))
    call = scripts.hold(keys, CALLER, parked.encode(), "normal", b"m", BODY, extras=much_later.encode(), depends_on=[A])
    await run(redis, call)

    assert await read_everything(redis) == before


async def test_deadline_outlives_hand_back_takeover_supply_and_promotion(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    first, second = await seed_running(redis, keys, 2, extras=IN_AN_HOUR)
    parked, delayed = (
        await seed_parked(redis, keys, A, extras=IN_AN_HOUR),
        await seed_delayed(redis, keys, extras=IN_AN_HOUR),
    )
    refs = [first.ref, second.ref, parked, delayed]
    before = [await deadline_of(redis, keys, ref) for ref in refs]

    await run(redis, scripts.hand_back(keys, "normal", "normal", [first.entry]))
    await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))
    await run(redis, scripts.supply(keys, parked, A, b"value"))
    await age(redis, keys.due, delayed)
    await run(redis, scripts.wake(keys))

    assert [await deadline_of(redis, keys, ref) for ref in refs] == before
    assert None not in before
    fields = {one.ref: int(one.fields[b"deadline"]) for one in await claim(redis, keys, 5)}
    assert fields == dict(zip(refs, before, strict=True))


@pytest.mark.parametrize("end", ["succeeded", "failed", "reject", "bury", "cancel"])
async def test_deadline_goes_with_the_end_of_its_request(redis: Control, keys: DeploymentKeys, end: str) -> None:
    await deploy_config(redis, keys, max_attempts=1)
    if end == "reject":
        ref = await seed_parked(redis, keys, A, extras=IN_AN_HOUR)
        await run(redis, scripts.reject(keys, ref, 60, b"error"))
    else:
        (one,) = await seed_running(redis, keys, extras=IN_AN_HOUR)
        match end:
            case "bury":
                await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))
            case "cancel":
                await cancel(redis, keys, one.ref)
            case _:
                await finish(redis, keys, one, state=end)

    assert not await redis.exists(keys.deadlines)


# found


async def test_requests_past_their_deadline_are_named_and_no_others(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    first, _, third = await seed_queued(redis, keys, 3, extras=IN_AN_HOUR)
    await seed_queued(redis, keys)
    await age(redis, keys.deadlines, first, third)

    swept = await run(redis, control_scripts.sweep(keys))

    assert sorted(swept.overdue) == sorted([first.encode(), third.encode()])
    assert await read_state(redis, keys, first) == State.QUEUED


async def test_one_sweep_names_so_many_and_no_more(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    refs = await seed_queued(redis, keys, SWEEP_LIMIT + 20, extras=IN_AN_HOUR)
    await age(redis, keys.deadlines, *refs)

    counts = []
    for _ in range(3):
        overdue = (await run(redis, control_scripts.sweep(keys))).overdue
        counts.append(len(overdue))
        await run(redis, scripts.cancel(keys, 60, OVERDUE, overdue, overdue=True))

    assert counts == [SWEEP_LIMIT, 20, 0]


async def test_deadline_of_what_is_not_open_is_forgotten(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()
    await redis.zadd(keys.deadlines, {ref: 1})

    (named,) = (await run(redis, control_scripts.sweep(keys))).overdue
    answers = await cancel(redis, keys, named.decode(), overdue=True)

    assert answers == [Ended.GONE]
    assert not await redis.exists(keys.deadlines)
    assert await read_state(redis, keys, ref) is None


# carried out


async def test_request_that_is_overdue_has_timed_out_and_all_are_told(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys, extras=IN_AN_HOUR)
    await age(redis, keys.deadlines, one.ref)
    await run(redis, scripts.watch(keys, "waiters", "app.B~b", [one.ref]))
    async with open_inbox(redis, keys) as inbox, open_orders(redis, keys) as orders:
        answers, waiters = await run(redis, scripts.cancel(keys, 7, OVERDUE, [one.ref], overdue=True))

        assert await inbox.take() == {one.ref: b"timed_out normal " + one.entry + b"\n" + OVERDUE.encode()}
        assert await orders.take_raw() == b"cancel normal " + one.entry
    assert (answers, waiters) == ([(Ended.ENDED, 0)], [Waiter(one.ref.encode(), "app.B~b")])
    assert await read_result(redis, keys, one.ref) == (f"timed_out normal {one.entry.decode()}", OVERDUE.encode())


async def test_clock_of_the_server_decides_and_not_that_of_the_caller(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (early,), (without,) = await seed_queued(redis, keys, extras=IN_AN_HOUR), await seed_queued(redis, keys)
    before = await read_everything(redis)

    answers, _ = await run(redis, scripts.cancel(keys, 60, OVERDUE, [early, without], overdue=True))

    (first, left_ms), second = answers
    assert first == Ended.EARLY and HOUR_MS - 60_000 < left_ms <= HOUR_MS
    assert second == (Ended.EARLY, -1)
    assert await read_everything(redis) == before


async def test_whoever_waits_for_as_long_as_it_was_told_finds_it_overdue(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (ref,) = await seed_queued(redis, keys, extras=asking(timeout_ms=40))

    async def is_over() -> bool:
        return await cancel(redis, keys, ref, overdue=True) == [Ended.ENDED]

    await wait_until(is_over)

    assert await read_state(redis, keys, ref) == State.TIMED_OUT


async def test_timeout_of_nothing_is_over_at_once_and_on_record(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    refs = [*await seed_queued(redis, keys, extras=asking(timeout_ms=0))]
    refs += await seed_queued(redis, keys, extras=asking(timeout_ms=-5))

    assert await cancel(redis, keys, *refs, overdue=True) == [Ended.ENDED] * 2


async def test_repeated_expiry_is_told_gone_and_changes_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (ref,) = await seed_queued(redis, keys, extras=IN_AN_HOUR)
    await age(redis, keys.deadlines, ref)
    await cancel(redis, keys, ref, overdue=True)
    before = await read_everything(redis)

    assert await cancel(redis, keys, ref, overdue=True) == [Ended.GONE]
    assert await read_everything(redis) == before


async def test_finish_that_comes_before_the_expiry_wins_and_the_other_way_round(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    in_time, late = await seed_running(redis, keys, 2, extras=IN_AN_HOUR)
    await age(redis, keys.deadlines, in_time.ref, late.ref)

    await finish(redis, keys, in_time)
    answers = await cancel(redis, keys, in_time.ref, late.ref, overdue=True)
    refused, _ = await finish(redis, keys, late)

    assert (answers, refused) == ([Ended.GONE, Ended.ENDED], {0: Finished.ENDED})
    assert await read_state(redis, keys, in_time.ref) == State.SUCCEEDED


async def test_value_that_comes_after_the_deadline_revives_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = await seed_parked(redis, keys, A, extras=IN_AN_HOUR)
    await age(redis, keys.deadlines, ref)
    await cancel(redis, keys, ref, overdue=True)

    assert await run(redis, scripts.supply(keys, ref, A, b"value")) == Supplied.GONE
