"""One look at a real server, with an installation on it."""

import time
from functools import partial

import pytest

from millstream.broker import registry as registry_module
from millstream.broker.connection import DOWN, Control, open_control
from millstream.broker.records import NewDeployment
from millstream.broker.registry import Registry
from millstream.config import DeploymentConfig, Settings
from millstream.dashboard.feed import Feed
from millstream.dashboard.rates import Rates
from millstream.dashboard.reading import look
from millstream.dashboard.snapshot import shape
from millstream.errors import BrokerUnavailableError
from tests.dashboard.seeding import MODEL, NODE, seed_shop
from tests.helpers import read_everything

pytestmark = pytest.mark.anyio


async def test_look_finds_the_whole_installation(redis: Control, settings: Settings) -> None:
    await seed_shop(redis, settings)

    found = await look(redis, settings)

    assert [view.tag for view in found.views] == ["shop.Gate", "shop.Model", "shop.Broken"]
    assert found.views[1].backlog.waiting == 7
    assert found.dead == {"shop.Gate": 0, "shop.Model": 0, "shop.Broken": 0}
    assert [node.node for node in found.nodes] == [NODE]
    assert (found.alive, found.leader) == (frozenset({NODE}), "a1b2c3d4 1")
    assert abs(found.at_ms - time.time() * 1000) < 5000


async def test_every_supported_server_says_what_is_shown_of_it(redis: Control, settings: Settings) -> None:
    server = shape(await look(redis, settings), {MODEL: Rates()}, settings).server

    assert server.kind in ("Redis", "Valkey")
    assert server.version[0].isdigit()
    assert (server.role, server.eviction_policy, server.is_aof_on) == ("master", "noeviction", False)
    assert server.used_memory_bytes > 100_000 and server.connected_clients >= 1


async def test_looking_changes_nothing(redis: Control, settings: Settings) -> None:
    await seed_shop(redis, settings)
    registry = Registry(redis, settings)
    await registry.client.delete(registry.keys.node_lease(NODE))  # a dead node stays on record, too
    before = await read_everything(redis)

    found = await look(redis, settings)

    assert await read_everything(redis) == before
    assert ([node.node for node in found.nodes], found.alive) == ([NODE], frozenset())


async def test_another_secret_is_said_once_for_all_records(redis: Control, settings: Settings) -> None:
    await seed_shop(redis, settings)
    await Registry(redis, settings).check_secret()
    other = Settings(settings.url, secret_key=b"another secret")

    latest = await Feed(other, partial(look, redis, other)).latest()

    assert "is used with another secret" in latest.error


async def test_two_hundred_deployments_need_few_connections(redis: Control, settings: Settings) -> None:
    registry = Registry(redis, settings)
    new = [NewDeployment(f"D{i}", DeploymentConfig(), b"never opened here") for i in range(200)]
    await registry.deploy("many", "D0", new)

    found = await look(redis, settings)

    assert len(found.views) == 200
    assert found.info["connected_clients"] < 20


async def test_server_that_is_gone_is_named() -> None:
    settings = Settings("redis://:hush@127.0.0.1:1")
    client = open_control(settings, "test")

    with pytest.raises(BrokerUnavailableError, match=r"cannot reach the server at redis://\*\*\*@127.0.0.1:1"):
        await look(client, settings)
    await client.aclose()


async def test_outage_in_the_midst_of_the_views_is_an_outage(
    redis: Control, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    await seed_shop(redis, settings)
    registry = Registry(redis, settings)

    async def lose(client: Control, commands: object) -> None:
        raise BrokerUnavailableError("gone")

    monkeypatch.setattr(registry_module, "send_all", lose)

    with pytest.raises(DOWN):
        await registry.views()
