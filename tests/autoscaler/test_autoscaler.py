"""The autoscaler on a real server: what it decides is on record, one decides at a time, and plans follow targets and nodes."""

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from millstream.autoscaler import autoscaler as autoscaler_module
from millstream.autoscaler.autoscaler import Autoscaler
from millstream.broker import control_scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.records import DeploymentView, NewDeployment, NodeRecord, Planned
from millstream.broker.registry import Registry
from millstream.config import AutoscalingConfig, DeploymentConfig, Settings
from tests.helpers import finish, seed_delayed, seed_queued, seed_running, wait_until
from tests.timing import timed

pytestmark = [pytest.mark.anyio, pytest.mark.on_cluster]

TAG = "app.Model"
SCALED = DeploymentConfig(
    autoscaling=AutoscalingConfig(min_replicas=0, max_replicas=5, downscale_delay_s=0), max_ongoing_requests=2
)


@pytest.fixture
async def registry(redis: Control, settings: Settings) -> Registry:
    return Registry(redis, settings)


@pytest.fixture
async def autoscaler(settings: Settings) -> AsyncIterator[Autoscaler]:
    autoscaler = Autoscaler(settings)
    yield autoscaler
    await autoscaler._client.aclose()


async def deploy(registry: Registry, config: DeploymentConfig, app: str = "app") -> str:
    """Deploy one deployment, `Model`; its version."""
    return (await registry.deploy(app, "Model", [NewDeployment("Model", config, b"")])).version


async def add_node(registry: Registry, name: str) -> None:
    text = registry.signer.write(NodeRecord(name, "host", 1, 0), name)
    await registry.client.hset(registry.keys.nodes, name, text)
    await registry.client.set(registry.keys.node_lease(name), name, px=60_000)


async def remove_node(registry: Registry, name: str) -> None:
    """As when its launcher died: its lease is gone."""
    await registry.client.delete(registry.keys.node_lease(name))


async def view(registry: Registry, app: str = "app") -> DeploymentView:
    found = await registry.view(app, "Model")
    assert found is not None
    return found


async def plans(registry: Registry, *nodes: str) -> dict[str, int]:
    """How many replicas of `app.Model` each node should run."""
    return {node: (await registry.plan(node)).get(TAG, (0, ""))[0] for node in nodes}


# decisions


@pytest.mark.parametrize(
    ("config", "target"),
    [
        (DeploymentConfig(num_replicas=3), 3),
        (SCALED, 0),
        (replace(SCALED, autoscaling=AutoscalingConfig(initial_replicas=2, max_replicas=5)), 2),
    ],
)
async def test_new_deployment_gets_its_first_target(
    registry: Registry, autoscaler: Autoscaler, config: DeploymentConfig, target: int
) -> None:
    await deploy(registry, config)
    assert not (await view(registry)).has_target

    await autoscaler.step()

    found = await view(registry)
    assert (found.has_target, found.target) == (True, target)
    assert found.reason


async def test_decision_is_on_record_with_its_reason_and_inputs(
    redis: Control, keys: DeploymentKeys, registry: Registry, autoscaler: Autoscaler
) -> None:
    await deploy(registry, SCALED)
    await autoscaler.step()
    await seed_queued(redis, keys, 4)

    await autoscaler.step()

    latest, first = await registry.decisions(TAG)
    assert (first["target"], first["was"], first["by"]) == ("0", "", autoscaler.name)
    assert (latest["target"], latest["was"]) == ("3", "0")
    assert "4 waiting and 0 in flight" in latest["reason"]
    assert (latest["waiting"], latest["in_flight"], latest["wanted"]) == ("4", "0", "3")
    assert abs(int(latest["at_ms"]) - time.time() * 1000) < 10_000


async def test_plan_of_many_deployments_wakes_its_node_once(
    redis: Control, registry: Registry, autoscaler: Autoscaler
) -> None:
    names = [f"D{number}" for number in range(20)]
    await registry.deploy("app", "D0", [NewDeployment(name, DeploymentConfig(), b"") for name in names])
    await add_node(registry, "n-1")
    async with redis.pubsub() as subscription:
        await subscription.subscribe(registry.keys.node_wake("n-1"))
        await subscription.get_message(timeout=5)

        await autoscaler.step()
        await redis.publish(registry.keys.node_wake("n-1"), "the end")
        heard = []
        while (message := await subscription.get_message(timeout=5))["data"] != b"the end":
            heard.append(message["data"])

    assert heard == [b"plan"]
    assert {planned.replicas for planned in (await registry.plan("n-1")).values()} == {1}
    assert len(await registry.plan("n-1")) == 20


async def test_decision_that_changes_nothing_is_not_recorded(registry: Registry, autoscaler: Autoscaler) -> None:
    await deploy(registry, SCALED)

    for _ in range(5):
        await autoscaler.step()

    assert len(await registry.decisions(TAG)) == 1


async def test_delayed_request_counts_from_when_it_is_due(
    redis: Control, keys: DeploymentKeys, registry: Registry, autoscaler: Autoscaler
) -> None:
    await deploy(registry, SCALED)
    await seed_delayed(redis, keys, 3_600_000)
    await autoscaler.step()
    await autoscaler.step()
    assert (await view(registry)).target == 0

    await seed_delayed(redis, keys, 1)
    await wait_until(lambda: _is_due(redis, keys))
    await autoscaler.step()

    assert (await view(registry)).target == 1


async def _is_due(redis: Control, keys: DeploymentKeys) -> bool:
    return (await run(redis, control_scripts.backlog(keys))).due == 1


async def test_it_goes_up_with_the_load_and_down_after_it(
    redis: Control, keys: DeploymentKeys, registry: Registry, autoscaler: Autoscaler
) -> None:
    await deploy(registry, SCALED)
    await autoscaler.step()

    claimed = await seed_running(redis, keys, 6)
    await autoscaler.step()
    high = (await view(registry)).target
    await finish(redis, keys, *claimed)
    autoscaler._histories.clear()  # a minute later, the rates of now are forgotten
    await autoscaler.step()
    await autoscaler.step()

    assert high == 5
    assert (await view(registry)).target == 0


async def test_word_of_the_operator_goes_before_the_policy(
    redis: Control, keys: DeploymentKeys, registry: Registry, autoscaler: Autoscaler
) -> None:
    await deploy(registry, SCALED)
    await seed_queued(redis, keys, 4)

    await registry.override(TAG, {"num_replicas": 1})
    await autoscaler.step()
    assert (await view(registry)).target == 1

    await registry.override(TAG, {"min_replicas": 4, "max_replicas": 4})
    await autoscaler.step()
    assert (await view(registry)).target == 4

    await registry.override(TAG, None)
    await autoscaler.step()
    assert (await view(registry)).target == 3


async def test_deployments_are_decided_apart(redis: Control, registry: Registry, autoscaler: Autoscaler) -> None:
    await deploy(registry, SCALED, "one")
    await deploy(registry, SCALED, "two")
    await autoscaler.step()
    await seed_queued(redis, DeploymentKeys("ms", "two.Model"), 4)

    await autoscaler.step()

    assert [(await view(registry, app)).target for app in ("one", "two")] == [0, 3]


# leaders


async def test_one_decides_and_the_others_stand_by(
    redis: Control, registry: Registry, autoscaler: Autoscaler, settings: Settings
) -> None:
    await deploy(registry, SCALED)
    other = Autoscaler(settings)

    await autoscaler.step()
    await other.step()

    assert [row["by"] for row in await registry.decisions(TAG)] == [autoscaler.name]
    leader: Any = await redis.get(registry.keys.leader)
    assert leader.decode().split()[0] == autoscaler.name
    await other._client.aclose()


async def test_next_one_leads_when_the_leader_resigns_or_dies(
    redis: Control, keys: DeploymentKeys, registry: Registry, autoscaler: Autoscaler, settings: Settings
) -> None:
    await deploy(registry, SCALED)
    await autoscaler.step()
    await autoscaler._resign()
    second, third = Autoscaler(settings), Autoscaler(settings)

    await seed_queued(redis, keys, 1)
    await second.step()
    await redis.delete(registry.keys.leader)  # as its lease ends some time after its death
    await seed_queued(redis, keys, 3)
    await third.step()

    assert [row["by"] for row in await registry.decisions(TAG)] == [third.name, second.name, autoscaler.name]
    for one in (second, third):
        await one._client.aclose()


async def test_former_leader_that_wakes_up_is_fenced_out(
    redis: Control, keys: DeploymentKeys, registry: Registry, autoscaler: Autoscaler, settings: Settings
) -> None:
    await deploy(registry, SCALED)
    old_fence = await run(redis, control_scripts.lead(registry.keys, autoscaler.name, 5))
    await redis.delete(registry.keys.leader)  # it slept, and its lease ended
    successor = Autoscaler(settings)
    await successor.step()
    await seed_queued(redis, keys, 4)

    await autoscaler._decide(await view(registry), old_fence)

    assert (await view(registry)).target == 0
    assert [row["by"] for row in await registry.decisions(TAG)] == [successor.name]
    await successor._client.aclose()


async def test_new_leader_does_not_shrink_before_it_has_watched_for_the_hold(
    redis: Control, registry: Registry, autoscaler: Autoscaler, settings: Settings
) -> None:
    config = replace(SCALED, autoscaling=AutoscalingConfig(min_replicas=1, max_replicas=5, initial_replicas=4))
    await deploy(registry, config)
    await autoscaler.step()
    await autoscaler._resign()
    successor = Autoscaler(settings)

    for _ in range(3):
        await successor.step()

    assert (await view(registry)).target == 4
    await successor._client.aclose()


async def test_decision_for_a_deployment_that_was_deleted_meanwhile_is_dropped(
    redis: Control, keys: DeploymentKeys, registry: Registry, autoscaler: Autoscaler
) -> None:
    await deploy(registry, SCALED)
    seen = await view(registry)
    fence = await run(redis, control_scripts.lead(registry.keys, autoscaler.name, 5))
    await registry.delete("app")

    await autoscaler._decide(seen, fence)

    assert not await redis.exists(keys.status, keys.scaling)


# plans


async def test_replicas_are_planned_on_the_nodes_there_are(registry: Registry, autoscaler: Autoscaler) -> None:
    for name in ("a", "b"):
        await add_node(registry, name)
    version = await deploy(registry, DeploymentConfig(num_replicas=3))

    await autoscaler.step()

    assert sorted((await plans(registry, "a", "b")).values()) == [1, 2]
    assert (await registry.plan("a"))[TAG][1] == version


async def test_plan_follows_a_new_version(registry: Registry, autoscaler: Autoscaler) -> None:
    await add_node(registry, "a")
    await deploy(registry, DeploymentConfig(num_replicas=2))
    await autoscaler.step()

    version = await deploy(registry, DeploymentConfig(num_replicas=2))
    await autoscaler.step()

    assert (await registry.plan("a"))[TAG] == Planned(2, version, version)


async def test_share_of_a_node_that_vanished_goes_to_the_others(registry: Registry, autoscaler: Autoscaler) -> None:
    for name in ("a", "b"):
        await add_node(registry, name)
    await deploy(registry, DeploymentConfig(num_replicas=4))
    await autoscaler.step()
    assert await plans(registry, "a", "b") == {"a": 2, "b": 2}

    await remove_node(registry, "b")
    await autoscaler.step()
    assert (await plans(registry, "a"))["a"] == 4

    await add_node(registry, "b")
    await autoscaler.step()
    assert sum((await plans(registry, "a", "b")).values()) == 4


async def test_deployment_without_nodes_is_planned_as_soon_as_there_is_one(
    registry: Registry, autoscaler: Autoscaler
) -> None:
    await deploy(registry, DeploymentConfig(num_replicas=2))
    await autoscaler.step()

    await add_node(registry, "a")
    await autoscaler.step()

    assert await plans(registry, "a") == {"a": 2}


async def test_deployment_that_was_deleted_leaves_every_plan(registry: Registry, autoscaler: Autoscaler) -> None:
    for name in ("a", "b"):
        await add_node(registry, name)
    await deploy(registry, DeploymentConfig(num_replicas=2))
    await autoscaler.step()

    await registry.delete("app")
    await autoscaler.step()

    assert [await registry.plan(node) for node in ("a", "b")] == [{}, {}]


async def test_launchers_are_woken_when_their_plan_changes_and_only_then(
    redis: Control, registry: Registry, autoscaler: Autoscaler
) -> None:
    await add_node(registry, "a")
    await deploy(registry, DeploymentConfig(num_replicas=2))
    async with redis.pubsub() as subscription:
        await subscription.subscribe(registry.keys.node_wake("a"))
        assert await subscription.get_message(timeout=2)
        while await subscription.get_message(timeout=0.1):
            """Nodes of a cluster pass on late what was published before, in another test say."""

        await autoscaler.step()
        assert await subscription.get_message(timeout=2) is not None

        await autoscaler.step()
        assert await subscription.get_message(timeout=0.05) is None


# the loop


@pytest.fixture
async def running(autoscaler: Autoscaler) -> AsyncIterator[Autoscaler]:
    """An autoscaler at work."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(autoscaler.run)
        yield autoscaler
        autoscaler.stop()


@timed
async def test_first_request_wakes_a_deployment_at_zero_at_once(
    redis: Control, keys: DeploymentKeys, registry: Registry, running: Autoscaler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoscaler_module, "TICK_S", 30)  # the stream wakes it, not the clock
    await deploy(registry, SCALED)
    await wait_until(lambda: _target_is(registry, 0))

    start = time.monotonic()
    await seed_queued(redis, keys, 1)
    await wait_until(lambda: _target_is(registry, 1))

    assert time.monotonic() - start < 0.5


async def _target_is(registry: Registry, target: int) -> bool:
    found = await registry.view("app", "Model")
    return found is not None and found.has_target and found.target == target


async def test_deploy_override_and_node_are_answered_at_once(
    registry: Registry, running: Autoscaler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoscaler_module, "TICK_S", 30)
    await deploy(registry, DeploymentConfig(num_replicas=1))
    await wait_until(lambda: _target_is(registry, 1), timeout_s=1)

    await registry.override(TAG, {"num_replicas": 2})
    await wait_until(lambda: _target_is(registry, 2), timeout_s=1)

    await add_node(registry, "a")
    await registry.announce("node a is up")

    async def is_planned() -> bool:
        return await plans(registry, "a") == {"a": 2}

    await wait_until(is_planned, timeout_s=1)


async def test_requests_for_a_deployment_that_is_to_stay_at_zero_do_not_keep_it_busy(
    redis: Control, keys: DeploymentKeys, registry: Registry, running: Autoscaler, monkeypatch: pytest.MonkeyPatch
) -> None:
    await deploy(registry, SCALED)
    await registry.override(TAG, {"num_replicas": 0})
    await wait_until(lambda: _target_is(registry, 0))
    passes = 0
    step = running.step

    async def counted() -> Any:
        nonlocal passes
        passes += 1
        return await step()

    monkeypatch.setattr(running, "step", counted)
    for _ in range(100):
        await seed_queued(redis, keys, 1)

    assert passes <= 5


async def test_leadership_is_given_up_at_the_end(redis: Control, registry: Registry, settings: Settings) -> None:
    autoscaler = Autoscaler(settings)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(autoscaler.run)
        await wait_until(lambda: _exists(redis, registry.keys.leader))
        autoscaler.stop()

    assert not await _exists(redis, registry.keys.leader)


async def _exists(redis: Control, key: str) -> bool:
    return bool(await redis.exists(key))


async def test_outage_leaves_targets_as_they_are_and_work_goes_on_after_it(
    redis: Control, keys: DeploymentKeys, registry: Registry, running: Autoscaler
) -> None:
    await deploy(registry, replace(SCALED, autoscaling=AutoscalingConfig(min_replicas=1, max_replicas=5, initial_replicas=4)))  # fmt: skip
    await wait_until(lambda: _target_is(registry, 4))

    for _ in range(3):
        for row in await redis.client_list():
            if row["name"].startswith("ms:autoscaler:"):
                await redis.client_kill_filter(_id=row["id"])
        await anyio.lowlevel.checkpoint()

    assert await _target_is(registry, 4)
    await registry.override(TAG, {"num_replicas": 1})
    await wait_until(lambda: _target_is(registry, 1))
