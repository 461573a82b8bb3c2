"""What `doctor` finds: keys without owner or end, and nothing that has one."""

import pytest

from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys, Keys
from millstream.broker.leaks import Leaks, find_leaks
from millstream.broker.registry import Registry
from millstream.broker.scripts import submit
from millstream.config import Settings
from tests.helpers import (
    asking,
    deploy_config,
    finish,
    node_of,
    request,
    seed_delayed,
    seed_parked,
    seed_queued,
    seed_running,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]

REF = "p" * 22


@pytest.fixture
def registry(redis: Control) -> Registry:
    return Registry(redis, Settings("redis://unused", secret_key=b"secret"))


async def test_everything_in_use_has_an_owner(redis: Control, keys: DeploymentKeys, registry: Registry) -> None:
    await registry.check_secret()
    await registry.announce("something")
    await deploy_config(redis, keys, max_attempts=1)
    await seed_queued(redis, keys, lane="high")
    await seed_parked(redis, keys, "up.A~" + "a" * 22, "up.B~" + "b" * 22)
    await seed_delayed(redis, keys)
    await redis.rpush(keys.payload(REF), b"pieces")
    await run(redis, submit(keys, "caller", request(REF, lane="low", extras=asking(payload=6), body=b"")))
    (one,) = await seed_running(redis, DeploymentKeys("ms", "app.Model"), lane="returned")
    await finish(redis, keys, one)
    await redis.hset(Keys("ms").nodes, "n-1", "{}")
    await redis.hset(Keys("ms").node_plan("n-1"), "app.Model", "{}")
    await (await node_of(redis, "somebody:elses")).set("somebody:elses", "key", ex=60)

    leaks = await find_leaks(registry)

    assert leaks.keys == [] and leaks.is_complete and leaks.looked_at > 10
    for key in (Keys("ms").nodes, Keys("ms").node_plan("n-1")):
        await redis.delete(key)


@pytest.mark.parametrize(
    "leak",
    [
        DeploymentKeys("ms", "app.Gone").open,
        DeploymentKeys("ms", "app.Model").payload(REF),
        DeploymentKeys("ms", "app.Model").supplied(REF),
        DeploymentKeys("ms", "app.Model").result(REF),
        DeploymentKeys("ms", "app.Model").lease("r-1"),
        Keys("ms").node_plan("gone"),
        "ms:nonsense",
        "{ms:nonsense",
    ],
)
async def test_key_without_owner_is_named(redis: Control, keys: DeploymentKeys, registry: Registry, leak: str) -> None:
    await deploy_config(redis, keys)
    await redis.set(leak, "left")

    assert (await find_leaks(registry)).keys == [leak]
    await redis.delete(leak)


async def test_key_with_an_end_is_none(redis: Control, keys: DeploymentKeys, registry: Registry) -> None:
    await redis.set(keys.result(REF), "value", ex=60)

    assert await find_leaks(registry) == Leaks(1, True, [])


async def test_no_more_keys_are_looked_at_than_wanted(redis: Control, registry: Registry) -> None:
    for number in range(10):
        await redis.set(f"ms:key-{number}", "x", ex=60)

    leaks = await find_leaks(registry, most=4)

    assert (leaks.looked_at, leaks.is_complete) == (4, False)
