"""Large values that open requests will read: noted by supply.lua, renewed by sweep.lua and keep.lua, forgotten at the end."""

from typing import Any

import pytest

from millstream.broker import control_scripts, scripts
from millstream.broker.connection import Control, run
from millstream.broker.control_scripts import RENEW_HOLDS_AFTER_MS
from millstream.broker.keys import DeploymentKeys
from millstream.broker.scripts import HOLD_MS, Supplied
from tests.helpers import (
    REPLICA,
    cancel,
    claim,
    deploy_config,
    finish,
    new_ref,
    now_ms,
    read_everything,
    seed_parked,
    seed_queued,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]

A, B = "up.A~" + "a" * 22, "up.B~" + "b" * 22
UP = DeploymentKeys("ms", "up.A")
OF_A, OF_B = UP.value("a" * 22, "1-1"), DeploymentKeys("ms", "up.B").value("b" * 22, "2-1")
LARGE = b"succeeded normal 1-1\n@70000"


async def supply(redis: Control, keys: DeploymentKeys, ref: str, value_id: str, *keep: str) -> Supplied:
    return await run(redis, scripts.supply(keys, ref, value_id, LARGE, keep))


async def holds(redis: Control, keys: DeploymentKeys, ref: str) -> tuple[int, list[str]]:
    """When they were renewed, and which."""
    noted: Any = await redis.hget(keys.holds, ref)
    renewed_ms, *names = noted.decode().split()
    return int(renewed_ms), names


async def seed_holding(redis: Control, keys: DeploymentKeys) -> str:
    """A queued request with a large value of another."""
    ref = await seed_parked(redis, keys, A)
    assert await supply(redis, keys, ref, A, OF_A) == Supplied.QUEUED
    return ref


async def let_them_age(redis: Control, keys: DeploymentKeys, *refs: str) -> None:
    for ref in refs:
        renewed_ms, names = await holds(redis, keys, ref)
        await redis.hset(keys.holds, ref, " ".join([str(renewed_ms - RENEW_HOLDS_AFTER_MS - 1), *names]))


# noted


async def test_large_values_of_a_request_are_noted_with_the_time(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    before_ms = await now_ms(redis)
    ref = await seed_parked(redis, keys, A, B)

    answers = [await supply(redis, keys, ref, A, OF_A), await supply(redis, keys, ref, B, OF_B)]

    renewed_ms, names = await holds(redis, keys, ref)
    assert answers == [Supplied.PARKED, Supplied.QUEUED]
    assert names == [OF_A, OF_B]
    assert before_ms <= renewed_ms <= await now_ms(redis)


async def test_repeated_supply_notes_them_once(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = await seed_parked(redis, keys, A, B)
    await supply(redis, keys, ref, A, OF_A)

    assert await supply(redis, keys, ref, A, OF_A) == Supplied.GONE
    assert (await holds(redis, keys, ref))[1] == [OF_A]


async def test_small_value_is_not_noted(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = await seed_parked(redis, keys, A)

    await supply(redis, keys, ref, A)

    assert not await redis.exists(keys.holds)


async def test_what_supplies_nobody_notes_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)

    assert await supply(redis, keys, new_ref(), A, OF_A) == Supplied.GONE
    assert not await redis.exists(keys.holds)


# forgotten


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancel", "discard", "bury"])
async def test_they_are_forgotten_with_the_end_of_the_request(redis: Control, keys: DeploymentKeys, end: str) -> None:
    await deploy_config(redis, keys, max_attempts=1)
    ref = await seed_holding(redis, keys)
    (one,) = await claim(redis, keys)

    match end:
        case "cancel":
            await cancel(redis, keys, ref)
        case "discard":
            await run(redis, scripts.discard(keys, "0", 60, "deleted", running=True))
        case "bury":
            await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))
        case _:
            await finish(redis, keys, one, state=end)

    assert not await redis.exists(keys.holds)


async def test_they_are_forgotten_when_another_value_never_comes(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = await seed_parked(redis, keys, A, B)
    await supply(redis, keys, ref, A, OF_A)

    await run(redis, scripts.reject(keys, ref, 60, b"error of b"))

    assert not await redis.exists(keys.holds)


async def test_takeover_does_not_forget_them(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = await seed_holding(redis, keys)
    (one,) = await claim(redis, keys)
    await run(redis, scripts.hand_back(keys, "normal", "normal", [one.entry]))
    await claim(redis, keys)

    await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))

    assert (await holds(redis, keys, ref))[1] == [OF_A]


async def test_sweep_forgets_what_is_noted_for_nobody(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await redis.hset(keys.holds, new_ref(), f"1 {OF_A}")

    swept = await run(redis, control_scripts.sweep(keys))

    assert swept.keep == []
    assert not await redis.exists(keys.holds)


# renewed


async def test_sweep_names_what_is_to_be_renewed_and_only_in_its_time(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    old, fresh = await seed_holding(redis, keys), await seed_holding(redis, keys)

    at_once = await run(redis, control_scripts.sweep(keys))
    await let_them_age(redis, keys, old)
    in_time = await run(redis, control_scripts.sweep(keys))
    again = await run(redis, control_scripts.sweep(keys))

    assert [swept.keep for swept in (at_once, in_time, again)] == [[], [OF_A], []]
    assert abs((await holds(redis, keys, old))[0] - (await holds(redis, keys, fresh))[0]) < 60_000


async def test_sweeper_that_dies_before_it_renews_leaves_time_for_others(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = await seed_holding(redis, keys)
    await let_them_age(redis, keys, ref)
    await run(redis, control_scripts.sweep(keys))  # and dies

    await let_them_age(redis, keys, ref)

    assert (await run(redis, control_scripts.sweep(keys))).keep == [OF_A]
    assert HOLD_MS > 3 * RENEW_HOLDS_AFTER_MS


@pytest.mark.parametrize("count", [5, 700])  # in a hash that is one block, and in one that is a table
async def test_every_one_is_found_in_the_course_of_some_sweeps(
    redis: Control, keys: DeploymentKeys, count: int
) -> None:
    await deploy_config(redis, keys)
    refs = await seed_queued(redis, keys, count)
    names = [UP.value(ref, "1-1") for ref in refs]
    await redis.hset(keys.holds, mapping={ref: f"1 {name}" for ref, name in zip(refs, names, strict=True)})

    found, cursor, steps = list[str](), b"", 0
    while cursor != b"0":
        swept = await run(redis, control_scripts.sweep(keys, cursor or b"0"))
        found, cursor, steps = found + swept.keep, swept.holds_cursor, steps + 1

    assert sorted(found) == sorted(names)
    assert steps <= count


# keep


async def test_keys_are_kept_for_longer_and_never_shorter(redis: Control, keys: DeploymentKeys) -> None:
    short, long, for_ever, gone = (UP.value(new_ref(), "1-1") for _ in range(4))
    await redis.set(short, "x", px=1000)
    await redis.set(long, "x", px=HOLD_MS * 2)
    await redis.set(for_ever, "x")

    count = await run(redis, scripts.keep([short, long, for_ever, gone]))

    left_ms = [await redis.pttl(key) for key in (short, long, for_ever, gone)]
    await redis.delete(for_ever)
    assert count == 3
    assert HOLD_MS - 60_000 < left_ms[0] <= HOLD_MS < left_ms[1] <= 2 * HOLD_MS
    assert left_ms[2:] == [-1, -2]


async def test_keeping_twice_is_as_once(redis: Control) -> None:
    key = UP.value(new_ref(), "1-1")
    await redis.set(key, "x", px=1000)

    counts = [await run(redis, scripts.keep([key], 60_000)) for _ in range(2)]

    assert counts == [1, 1]
    assert 50_000 < await redis.pttl(key) <= 60_000


async def test_keeping_what_is_gone_brings_nothing_back(redis: Control) -> None:
    before = await read_everything(redis)

    assert await run(redis, scripts.keep([OF_A])) == 0
    assert await read_everything(redis) == before
