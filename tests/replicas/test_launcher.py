"""One pass of the launcher where it could stumble; whole process trees are in `tests/scenarios`."""

import time
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from millstream.autoscaler.autoscaler import Autoscaler
from millstream.broker.connection import Control
from millstream.broker.records import NewDeployment, Planned
from millstream.broker.registry import Registry
from millstream.config import DeploymentConfig, Settings
from millstream.errors import BrokerUnavailableError
from millstream.replicas.launcher import Launcher
from tests.helpers import wait_until


@pytest.mark.anyio
async def test_fewer_replicas_wanted_while_some_are_being_started_is_no_error(settings: Settings) -> None:
    launcher = Launcher(settings, "node")
    for _ in range(3):
        launcher._starts.begin("app.Model", "v")  # forks under way: they have no names yet, and cannot be drained

    await launcher.step()

    await launcher._client.aclose()


@pytest.mark.anyio
async def test_replica_counts_once_while_it_is_being_listed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass of the launcher that counted it twice would drain it as one too many."""
    launcher, seen = Launcher(settings, "node"), []
    process = SimpleNamespace(
        replica="r-1", tag="app.Model", version="v", is_ready=False, is_draining=False, ongoing=0, heading="",
        is_updating=False, is_spent=False, stuck_at="",
    )  # fmt: skip

    async def fork(tag: str, version: str) -> Any:
        launcher._replicas["r-1"] = process  # type: ignore[assignment]
        return process

    async def enlist(process: Any) -> None:
        seen.extend(launcher._running({}))

    monkeypatch.setattr(launcher, "_fork", fork)
    monkeypatch.setattr(launcher._membership, "enlist", enlist)
    launcher._starts.begin("app.Model", "v")

    await launcher._start("app.Model", "v")

    assert [one.replica for one in seen] == ["r-1"]
    await launcher._client.aclose()


@pytest.mark.anyio
async def test_application_is_warmed_up_once_however_often_the_plan_changes_meanwhile(
    settings: Settings, redis: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at a version reads all its deployments, of which there may be a thousand."""
    launcher, registry = Launcher(settings, "node"), Registry(redis, settings)
    await registry.deploy("app", "Model", [NewDeployment("Model", DeploymentConfig(num_replicas=0), b"")])
    asked, may_go_on = [], anyio.Event()

    async def of_version(app: str, version: str) -> dict[str, DeploymentConfig]:
        asked.append(app)
        await may_go_on.wait()
        raise BrokerUnavailableError("gone")

    monkeypatch.setattr(launcher._registry, "of_version", of_version)
    await launcher._membership.join()
    async with anyio.create_task_group() as tasks:
        launcher._tasks = tasks
        await registry.assign("node", {"app.Model": Planned(0, "v")})
        for _ in range(3):
            await launcher.step()
            await anyio.lowlevel.checkpoint()
        at_once = list(asked)
        may_go_on.set()
        await wait_until(lambda: not launcher._warming)
        await launcher.step()  # the first one has failed
        await wait_until(lambda: len(asked) == 2)

    assert at_once == ["app"]
    await launcher._membership.leave()
    await launcher._client.aclose()


@pytest.mark.anyio
async def test_replica_that_stops_while_it_drains_has_its_health_timeout_and_no_longer(settings: Settings) -> None:
    """What it holds would wait for the whole of its grace."""
    launcher, killed = Launcher(settings, "node"), list[str]()
    now = time.monotonic()
    process = SimpleNamespace(
        replica="r-1", tag="app.Model", is_ready=True, kill_at=now + 1000.0, well_at=now - 31.0, kill=killed.append
    )
    launcher._replicas["r-1"] = process  # type: ignore[assignment]

    await launcher._kill_the_hung()

    assert killed == ["killed: no sign of life for 31 s"]
    await launcher._client.aclose()


@pytest.mark.anyio
async def test_launcher_and_autoscaler_live_on_a_full_server(settings: Settings, redis: Control) -> None:
    launcher, autoscaler, registry = Launcher(settings, "node"), Autoscaler(settings), Registry(redis, settings)
    await registry.deploy("app", "Model", [NewDeployment("Model", DeploymentConfig(num_replicas=0), b"")])
    await redis.config_set("maxmemory", 1)
    try:
        await launcher._membership.join()
        await autoscaler.step()
        await launcher._membership.renew(())
    finally:
        await redis.config_set("maxmemory", 0)

    assert "node" in await registry.nodes()
    assert "app.Model" in await registry.plan("node")
    await launcher._client.aclose()
    await autoscaler._client.aclose()


@pytest.mark.anyio
@pytest.mark.parametrize("stalled", [False, True])
async def test_silent_replica_is_killed_unless_the_server_was_silent_too(settings: Settings, stalled: bool) -> None:
    launcher, killed = Launcher(settings, "node"), list[str]()
    process = SimpleNamespace(
        replica="r-1", tag="app.Model", is_ready=True, kill_at=None, well_at=time.monotonic() - 60, kill=killed.append
    )
    launcher._replicas["r-1"] = process  # type: ignore[assignment]
    launcher._answered_at -= 40 if stalled else 0

    await launcher._kill_the_hung()

    assert killed == ([] if stalled else ["killed: no sign of life for 60 s"])
    await launcher._client.aclose()
