"""removing.lua: what finishes together leaves the lane together, by one XTRIM where it can; and nothing else leaves it."""

import random
from typing import Any

import pytest

from millstream.broker.connection import Control
from millstream.broker.keys import GROUP, DeploymentKeys
from tests.helpers import CALLER, Claimed, claim, deploy_config, finish, new_ref, seed_queued, seed_running

pytestmark = [pytest.mark.anyio, pytest.mark.fake]


async def entries_in(redis: Control, keys: DeploymentKeys) -> list[bytes]:
    found: Any = await redis.xrange(keys.lane("normal"))
    return [entry for entry, _ in found]


async def pending_in(redis: Control, keys: DeploymentKeys) -> list[bytes]:
    rows: Any = await redis.xpending_range(keys.lane("normal"), GROUP, "-", "+", 1000)
    return [row["message_id"] for row in rows]


@pytest.mark.parametrize("seed", range(4))
async def test_lane_holds_exactly_what_has_not_ended_whatever_the_order(
    redis: Control, keys: DeploymentKeys, seed: int
) -> None:
    await deploy_config(redis, keys)
    dice = random.Random(seed)
    waiting = [ref.encode() for ref in await seed_queued(redis, keys, 260)]
    running: list[Claimed] = []
    while waiting or running:
        if waiting and dice.random() < 0.5:
            taken = await claim(redis, keys, dice.randint(1, 60), replica=f"r-{dice.randint(1, 3)}")
            assert [one.ref.encode() for one in taken] == waiting[: len(taken)]
            del waiting[: len(taken)]
            running += taken
        if running:
            if dice.random() < 0.5:
                dice.shuffle(running)
            count = dice.choice([1, 3, 4, 20, 50])
            ending, running = running[:count], running[count:]
            assert await finish(redis, keys, *ending) == ({}, [])
        left = await entries_in(redis, keys)
        assert sorted(left[: len(running)]) == sorted(one.entry for one in running)
        assert len(left) == len(running) + len(waiting)
        assert sorted(await pending_in(redis, keys)) == sorted(one.entry for one in running)


async def test_what_waits_stays_when_all_that_ran_has_ended(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    running = await seed_running(redis, keys, 30)
    waiting = await seed_queued(redis, keys, 30)

    await finish(redis, keys, *running)

    assert [one.ref for one in await claim(redis, keys, 100)] == waiting


async def test_entry_ids_are_compared_as_numbers(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ids = [b"99-5", b"998-9", b"998-10", b"999-1", b"999-99", b"999-100", b"1000-2", b"1000-10", b"20000-1"]
    refs = [new_ref() for _ in ids]
    for entry, ref in zip(ids, refs, strict=True):
        fields = {"ref": ref, "method": "m", "reply": CALLER, "body": b"b"}
        await redis.xadd(keys.lane("normal"), fields, id=entry)  # type: ignore[arg-type]
        await redis.hset(keys.open, ref, "normal " + entry.decode())
    running = await claim(redis, keys, len(ids))

    await finish(redis, keys, *[running[i] for i in (7, 0, 2, 4, 1, 8)])
    assert await entries_in(redis, keys) == [b"999-1", b"999-100", b"1000-2"]

    await finish(redis, keys, *[running[i] for i in (6, 5, 3)])
    assert await entries_in(redis, keys) == []


async def test_attempts_from_before_a_lost_group_take_nothing_with_them(redis: Control, keys: DeploymentKeys) -> None:
    """Then the new group has not delivered what the old one had: its entries are waiting."""
    await deploy_config(redis, keys)
    first, running = await seed_running(redis, keys, 10), await seed_running(redis, keys, 10)
    lane = keys.lane("normal")
    await redis.xgroup_destroy(lane, GROUP)
    await redis.xgroup_create(lane, GROUP, id="0")

    await finish(redis, keys, *running)

    assert await entries_in(redis, keys) == [one.entry for one in first]
    assert [one.ref for one in await claim(redis, keys, 100)] == [one.ref for one in first]
