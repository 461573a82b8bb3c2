"""remove.lua: a closed deployment goes as a whole, or not at all."""

import pytest

from millstream.broker import control_scripts
from millstream.broker.connection import Control, run
from millstream.broker.control_scripts import Removed
from millstream.broker.keys import DeploymentKeys
from tests.helpers import deploy_config, finish, read_everything, seed_queued, seed_running

pytestmark = [pytest.mark.anyio, pytest.mark.fake]


async def test_closed_deployment_goes_and_its_results_stay(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await finish(redis, keys, one)
    await redis.delete(keys.config)

    assert [await run(redis, control_scripts.remove(keys)) for _ in range(2)] == [Removed.REMOVED] * 2

    assert [key.decode() async for key in redis.scan_iter()] == [keys.result(one.ref)]


async def test_what_was_deployed_anew_stays_with_its_requests(redis: Control, keys: DeploymentKeys) -> None:
    """However late the deploy comes: there is nothing between looking and deleting."""
    await deploy_config(redis, keys)
    await seed_queued(redis, keys)
    before = await read_everything(redis)

    assert await run(redis, control_scripts.remove(keys)) == Removed.DEPLOYED

    assert await read_everything(redis) == before


async def test_nothing_that_waits_for_an_end_is_deleted(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await redis.delete(keys.config)
    before = await read_everything(redis)

    assert await run(redis, control_scripts.remove(keys)) == Removed.OPEN

    assert await read_everything(redis) == before
    await finish(redis, keys, one)
    assert await run(redis, control_scripts.remove(keys)) == Removed.REMOVED
