"""As many requests as there may be in one call: Lua hands 8000 arguments at most to a command."""

import pytest
from redis.exceptions import ResponseError

from millstream.broker import scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.scripts import Ended
from tests.helpers import (
    asking,
    cancel,
    deploy_config,
    finish,
    new_ref,
    open_orders,
    read_everything,
    request,
    seed_queued,
    seed_running,
)

pytestmark = pytest.mark.anyio


async def test_as_many_as_one_submit_takes_are_taken_and_one_more_is_refused(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    many = [part for _ in range(3900) for part in request(new_ref(), body=b"")]

    with pytest.raises(ResponseError, match="3900 requests at most"):
        await run(redis, scripts.submit(keys, "", (*many, *request(new_ref()))))
    refused = await redis.exists(keys.open)
    answers = await run(redis, scripts.submit(keys, "", many))

    assert (refused, answers) == (0, {})
    assert await redis.xlen(keys.lane("normal")) == await redis.hlen(keys.open) == 3900


async def test_as_many_as_one_finish_takes_end_and_more_are_refused(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    attempts = await seed_running(redis, keys, 5000, caller="")
    before = await read_everything(redis)

    with pytest.raises(ResponseError, match="less than 5000"):
        await finish(redis, keys, *attempts, caller="")
    unchanged = await read_everything(redis) == before
    refused, _ = await finish(redis, keys, *attempts[:4999], caller="")

    assert (unchanged, refused) == (True, {})
    assert await redis.hlen(keys.open) == await redis.xlen(keys.lane("normal")) == 1


async def test_any_number_is_cancelled_in_one_call(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    refs = await seed_queued(redis, keys, 8500, caller="", extras=asking(timeout_ms=3_600_000))

    answers = await cancel(redis, keys, *refs)

    assert answers == [Ended.ENDED] * 8500
    assert not await redis.exists(keys.open, keys.deadlines)


@pytest.mark.parametrize("count", [500, 3000])  # in a hash that is one block, and in one that is a table
async def test_large_backlog_is_discarded_step_by_step(redis: Control, keys: DeploymentKeys, count: int) -> None:
    await deploy_config(redis, keys)
    running = await seed_running(redis, keys, 3)
    await seed_queued(redis, keys, count, caller="")
    steps, cursor = 0, ""

    async with open_orders(redis, keys) as orders:
        while cursor != "0":
            cursor, _ = await run(redis, scripts.discard(keys, cursor or "0", 60, "deleted", running=True))
            steps += 1
        told = sorted([await orders.take_raw() for _ in running])

    assert told == sorted(b"cancel normal " + one.entry for one in running)
    assert not await redis.exists(keys.open)
    assert await redis.xlen(keys.lane("normal")) == 0
    assert steps > count // 1000
