"""One pass of the launcher where it could stumble; whole process trees are in `tests/scenarios`."""

import pytest

from millstream.autoscaler.autoscaler import Autoscaler
from millstream.broker.connection import Control
from millstream.broker.records import NewDeployment
from millstream.broker.registry import Registry
from millstream.config import DeploymentConfig, Settings
from millstream.replicas.launcher import Launcher


@pytest.mark.anyio
async def test_fewer_replicas_wanted_while_some_are_being_started_is_no_error(settings: Settings) -> None:
    launcher = Launcher(settings, "node")
    for _ in range(3):
        launcher._starts.begin("app.Model", "v")  # forks under way: they have no names yet, and cannot be drained

    await launcher.step()

    await launcher._client.aclose()


@pytest.mark.anyio
async def test_launcher_and_autoscaler_live_on_a_full_server(settings: Settings, redis: Control) -> None:
    launcher, autoscaler, registry = Launcher(settings, "node"), Autoscaler(settings), Registry(redis, settings)
    await registry.deploy("app", "Model", [NewDeployment("Model", DeploymentConfig(num_replicas=0), b"")])
    await redis.config_set("maxmemory", 1)
    try:
        await launcher._register()
        await autoscaler.step()
        await launcher._renew()
    finally:
        await redis.config_set("maxmemory", 0)

    assert "node" in await registry.nodes()
    assert "app.Model" in await registry.plan("node")
    await launcher._client.aclose()
    await autoscaler._client.aclose()
