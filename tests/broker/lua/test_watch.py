"""watch.lua: what became of some refs, and who will be told of the others' end."""

import pytest

from millstream.broker import scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from tests.helpers import (
    deploy_config,
    finish,
    new_ref,
    open_inbox,
    read_everything,
    seed_delayed,
    seed_parked,
    seed_queued,
    seed_running,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]


async def watch(redis: Control, keys: DeploymentKeys, *refs: str, how: str = "", who: str = "") -> list[bytes]:
    return await run(redis, scripts.watch(keys, how, who, refs))


async def test_answers_come_in_the_order_of_the_refs(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (ended,) = await seed_running(redis, keys)
    await finish(redis, keys, ended, value=b"\x00\n\xff")
    (running,) = await seed_running(redis, keys)
    (queued,) = await seed_queued(redis, keys)
    parked, delayed = await seed_parked(redis, keys), await seed_delayed(redis, keys)

    answers = await watch(redis, keys, queued, new_ref(), ended.ref, parked, running.ref, delayed)

    stored = b"succeeded normal " + ended.entry + b"\n\x00\n\xff"
    assert answers == [b"open", b"unknown", stored, b"open", b"open", b"open"]


async def test_only_looking_writes_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (ref,) = await seed_queued(redis, keys)
    before = await read_everything(redis)

    await watch(redis, keys, ref)

    assert await read_everything(redis) == before


@pytest.mark.parametrize("how", ["readers", "waiters"])
async def test_who_watches_twice_is_noted_once(redis: Control, keys: DeploymentKeys, how: str) -> None:
    await deploy_config(redis, keys)
    (ref,) = await seed_queued(redis, keys)

    for who in ("anna", "bert", "anna"):
        await watch(redis, keys, ref, how=how, who=who)

    noted = await redis.hget(keys.notes, f"{ref}:{how}")
    assert noted is not None and noted.split() == [b"anna", b"bert"]


async def test_what_is_not_open_is_not_noted(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await finish(redis, keys, one)

    await watch(redis, keys, one.ref, new_ref(), how="readers", who="anna")

    assert not await redis.exists(keys.notes)


async def test_name_that_is_part_of_a_noted_one_is_noted_as_well(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await watch(redis, keys, one.ref, how="readers", who="joanna")

    await watch(redis, keys, one.ref, how="readers", who="anna")

    async with open_inbox(redis, keys, "anna") as anna:
        await finish(redis, keys, one)
        assert (await anna.take()).keys() == {one.ref}
