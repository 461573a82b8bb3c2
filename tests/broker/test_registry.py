"""The control plane's records: what is deployed, what may be deleted when, who lives, and one view of it all."""

from dataclasses import replace
from typing import Any

import anyio
import pytest

from millstream.broker import control_scripts, scripts
from millstream.broker import registry as registry_module
from millstream.broker.connection import Control, open_control, run
from millstream.broker.keys import DeploymentKeys, Keys
from millstream.broker.records import Current, DeploymentView, NewDeployment, NodeRecord, Planned, ReplicaRecord
from millstream.broker.registry import Registry, connect_registry
from millstream.broker.states import State
from millstream.config import DeploymentConfig, Settings
from millstream.errors import BrokerUnavailableError, SignatureError
from tests.helpers import (
    asking,
    finish,
    new_ref,
    read_state,
    request,
    seed_delayed,
    seed_parked,
    seed_queued,
    seed_running,
    wait_until,
)
from tests.servers import free_port

pytestmark = [pytest.mark.anyio, pytest.mark.fake]

ALL = Keys("ms")


@pytest.fixture
def registry(redis: Control, settings: Settings) -> Registry:
    return Registry(redis, settings)


def new(name: str = "Model", **options: Any) -> NewDeployment:
    return NewDeployment(name, DeploymentConfig().updated(options), b"definition of " + name.encode())


async def add_replica(
    registry: Registry, keys: DeploymentKeys, name: str, *, version: str = "", state: str = "RUNNING"
) -> None:
    record = ReplicaRecord(name, "n-1", 1, version, state, 0, revision=version)
    await registry.client.hset(keys.replicas, name, registry.signer.write(record, keys.tag, name))
    await run(registry.client, control_scripts.renew([keys.lease(name)], 60, "launcher"))


async def view(registry: Registry) -> DeploymentView:
    found = await registry.view("app", "Model")
    assert found is not None
    return found


# the secret


async def test_processes_of_one_secret_agree(registry: Registry) -> None:
    await registry.check_secret()
    await registry.check_secret()


async def test_second_secret_on_a_namespace_is_refused(redis: Control, settings: Settings, registry: Registry) -> None:
    await registry.check_secret()
    other = Registry(redis, Settings(settings.url, secret_key=b"another secret"))

    with pytest.raises(SignatureError, match="used with another secret"):
        await other.check_secret()


async def test_namespaces_have_their_own_secrets(redis: Control, settings: Settings, registry: Registry) -> None:
    await registry.check_secret()

    await Registry(redis, Settings(settings.url, "other", b"another secret")).check_secret()


async def test_dead_server_is_reported_as_such() -> None:
    settings = Settings(f"redis://127.0.0.1:{free_port()}")
    async with open_control(settings, "test") as client:
        with pytest.raises(BrokerUnavailableError):
            await connect_registry(client, settings)


# deploy and delete


async def test_deployed_application_takes_requests(redis: Control, keys: DeploymentKeys, registry: Registry) -> None:
    record = await registry.deploy("app", "Model", [new(max_attempts=1, result_ttl_s=2.5)])

    (one,) = await seed_running(redis, keys)
    await run(redis, scripts.release(keys, "normal", "r-1", "killed", expired=False))

    assert (await registry.apps()) == {"app": record}
    assert record.tags == ["app.Model"]
    assert await registry.definition("app.Model") == b"definition of Model"
    assert await read_state(redis, keys, one.ref) == "dead"  # max_attempts reached the scripts


async def test_deploying_again_keeps_the_requests_and_changes_the_version(
    redis: Control, keys: DeploymentKeys, registry: Registry
) -> None:
    first = await registry.deploy("app", "Model", [new()])
    (ref,) = await seed_queued(redis, keys)

    second = await registry.deploy("app", "Model", [new()])

    assert first.version != second.version
    assert await read_state(redis, keys, ref) == "queued"


async def test_limit_and_timeout_reach_the_scripts(redis: Control, keys: DeploymentKeys, registry: Registry) -> None:
    await registry.deploy("app", "Model", [new(max_queued_requests=2, request_timeout_s=0.0015)])
    refs = [new_ref() for _ in range(3)]

    answers = await run(redis, scripts.submit(keys, "", [part for ref in refs for part in request(ref)]))

    config = await redis.hgetall(keys.config)
    assert (config[b"max_queued"], config[b"timeout_ms"]) == (b"2", b"1")
    assert answers == {2: scripts.Submitted.FULL}
    assert set(await redis.zrange(keys.deadlines, 0, -1)) == {ref.encode() for ref in refs[:2]}


async def test_version_without_limit_and_timeout_ends_those_of_the_version_before(
    redis: Control, keys: DeploymentKeys, registry: Registry
) -> None:
    await registry.deploy("app", "Model", [new(max_queued_requests=1, request_timeout_s=60)])
    await registry.deploy("app", "Model", [new()])

    await seed_queued(redis, keys, 3)

    assert await redis.hmget(keys.config, "max_queued", "timeout_ms") == [None, None]
    assert not await redis.exists(keys.deadlines)


async def test_deployment_that_is_no_longer_part_of_the_application_goes(redis: Control, registry: Registry) -> None:
    await registry.deploy("app", "Model", [new("Model"), new("Old")])

    await registry.deploy("app", "Model", [new("Model")])

    assert await registry.view("app", "Old") is None
    assert not await redis.exists(*ALL.deployment("app.Old").owned)
    assert await registry.view("app", "Model") is not None


async def test_config_of_the_same_code_keeps_the_version(registry: Registry) -> None:
    first = await registry.deploy("app", "Model", [coded("a", num_replicas=1)])
    second = await registry.deploy("app", "Model", [coded("a", num_replicas=2)])
    third = await registry.deploy("app", "Model", [coded("b", num_replicas=2)])

    assert len({record.version for record in (first, second, third)}) == 3
    assert await registry.of_version("app", first.version) == {}
    assert await registry.current("app.Model") == Current(
        third.version, third.version, coded("b", num_replicas=2).config
    )
    assert await registry.current("app.Other") is None


def coded(code: str, name: str = "Model", **options: Any) -> NewDeployment:
    return NewDeployment(name, DeploymentConfig().updated(options), b"definition", code)


async def test_deployments_of_one_application_have_their_own_versions(registry: Registry) -> None:
    first = await registry.deploy("app", "Model", [coded("a"), coded("x", "Other")])
    second = await registry.deploy("app", "Model", [coded("b"), coded("x", "Other")])

    assert set(await registry.of_version("app", first.version)) == {"app.Other"}
    assert set(await registry.of_version("app", second.version)) == {"app.Model"}
    assert await registry.of_version("other", second.version) == {}


async def test_deployment_that_leaves_serves_on_while_replicas_of_the_former_version_may_call_it(
    redis: Control, registry: Registry
) -> None:
    before = await registry.deploy("app", "Model", [coded("a"), coded("x", "Old")])
    caller, callee = ALL.deployment("app.Model"), ALL.deployment("app.Old")
    await add_replica(registry, caller, "r-1", version=before.version, state="DRAINING")
    await add_replica(registry, callee, "r-2", version=before.version)

    await registry.deploy("app", "Model", [coded("b")])
    await registry.retire()
    (ref,) = await seed_queued(redis, callee)
    seen = (
        [view.name for view in await registry.views()],
        [view.name for view in await registry.views(with_leaving=True)],
    )
    assert (await registry.apps())["app"].all_tags == ["app.Model", "app.Old"]

    await forget_replica(redis, caller, "r-1")
    await registry.retire()
    is_closed = not await redis.exists(callee.config)
    is_waiting_for_its_replicas = "Old" in (await registry.apps())["app"].leaving
    await forget_replica(redis, callee, "r-2")
    await registry.retire()

    assert seen == (["Model"], ["Model", "Old"])
    assert is_closed and is_waiting_for_its_replicas
    assert (await registry.apps())["app"].leaving == {}
    assert not await redis.exists(*callee.owned)
    assert await read_state(redis, callee, ref) is State.CANCELLED


async def forget_replica(redis: Control, keys: DeploymentKeys, name: str) -> None:
    await redis.hdel(keys.replicas, name)
    await redis.delete(keys.lease(name))


async def test_deployment_that_comes_back_before_it_has_left_stays(redis: Control, registry: Registry) -> None:
    both = [coded("a"), coded("x", "Old")]
    before = await registry.deploy("app", "Model", both)
    caller = ALL.deployment("app.Model")
    await add_replica(registry, caller, "r-1", version=before.version)
    await registry.deploy("app", "Model", [coded("b")])
    leaving = (await registry.apps())["app"].leaving

    await registry.deploy("app", "Model", both)
    await registry.retire()

    assert leaving == {"Old": before.version}
    assert (await registry.apps())["app"].leaving == {}
    assert await registry.view("app", "Old") is not None
    await forget_replica(redis, caller, "r-1")


async def test_retiring_by_an_old_record_does_not_close_what_was_deployed_anew(
    redis: Control, registry: Registry
) -> None:
    both = [coded("a"), coded("x", "Old")]
    before = await registry.deploy("app", "Model", both)
    await add_replica(registry, ALL.deployment("app.Model"), "r-1", version=before.version)
    await registry.deploy("app", "Model", [coded("b")])
    old_records = await registry.apps()
    await registry.deploy("app", "Model", both)
    await forget_replica(redis, ALL.deployment("app.Model"), "r-1")
    newer = Registry(redis, registry.settings)
    newer.apps = lambda: _give(old_records)  # type: ignore[method-assign]

    await newer.retire()

    assert await registry.view("app", "Old") is not None
    assert (await registry.apps())["app"].deployments == ["Model", "Old"]


async def _give(value: Any) -> Any:
    return value


async def test_deleted_application_takes_along_what_is_leaving_it(redis: Control, registry: Registry) -> None:
    before = await registry.deploy("app", "Model", [coded("a"), coded("x", "Old")])
    caller = ALL.deployment("app.Model")
    await add_replica(registry, caller, "r-1", version=before.version)
    await registry.deploy("app", "Model", [coded("b")])
    await redis.delete(caller.lease("r-1"))

    await registry.delete("app")

    assert {name.decode() async for name in redis.scan_iter()} == {ALL.changes}


async def test_deleted_application_leaves_its_results_and_nothing_else(
    redis: Control, keys: DeploymentKeys, registry: Registry
) -> None:
    await registry.deploy("app", "Model", [new()])
    (ended,) = await seed_running(redis, keys)
    await finish(redis, keys, ended)
    open_refs = [*await seed_queued(redis, keys, 3), await seed_parked(redis, keys), await seed_delayed(redis, keys)]
    open_refs += [large := new_ref(), (await seed_delayed(redis, keys, extras=asking(timeout_ms=60_000)))]
    await redis.set(keys.payload(large), b"large arguments", px=60_000)
    await run(redis, scripts.submit(keys, "", request(large, extras=asking(payload=True, timeout_ms=60_000))))

    deleted = await registry.delete("app")

    left = {name.decode() async for name in redis.scan_iter()}
    assert deleted
    assert left == {ALL.changes, *(keys.result(ref) for ref in [ended.ref, *open_refs])}
    assert {await read_state(redis, keys, ref) for ref in open_refs} == {State.CANCELLED}


async def test_application_of_more_deployments_than_a_client_has_connections_can_be_deleted(
    redis: Control, registry: Registry
) -> None:
    await registry.deploy("app", "D0", [new(f"D{number}") for number in range(120)])

    await registry.delete("app")

    assert {name.decode() async for name in redis.scan_iter()} == {ALL.changes}


async def test_unknown_application_cannot_be_deleted(registry: Registry) -> None:
    assert not await registry.delete("app")


async def test_deleted_application_waits_for_its_replicas_and_takes_nothing_new(
    redis: Control, keys: DeploymentKeys, registry: Registry
) -> None:
    await registry.deploy("app", "Model", [new()])
    (one,) = await seed_running(redis, keys)
    await add_replica(registry, keys, "r-1")

    async def is_closed() -> bool:
        return not await redis.exists(keys.config)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(registry.delete, "app")
        await wait_until(is_closed)
        with pytest.raises(Exception, match="NODEPLOYMENT"):
            await run(redis, scripts.submit(keys, "", (b"r" * 22, "normal", b"m", "", b"")))
        refused, _ = await finish(redis, keys, one)
        await redis.delete(keys.lease("r-1"))

    assert refused == {}
    assert not await redis.exists(*keys.owned)


async def test_application_deployed_again_while_it_is_being_deleted_stays(
    redis: Control, keys: DeploymentKeys, registry: Registry
) -> None:
    await registry.deploy("app", "Model", [new()])
    await add_replica(registry, keys, "r-1")

    async def is_closed() -> bool:
        return not await redis.exists(keys.config)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(registry.delete, "app")
        await wait_until(is_closed)
        await registry.deploy("app", "Model", [new()])
        (ref,) = await seed_queued(redis, keys)
        await redis.delete(keys.lease("r-1"))

    assert await registry.view("app", "Model") is not None
    assert await read_state(redis, keys, ref) == "queued"


async def test_every_change_wakes_the_autoscaler(redis: Control, registry: Registry) -> None:
    await registry.deploy("app", "Model", [new()])
    await registry.override("app.Model", {"num_replicas": 2})
    await registry.delete("app")

    changes: Any = await redis.xrange(ALL.changes)
    assert [fields[b"what"].decode() for _, fields in changes] == [
        "deployed app",
        "override of app.Model",
        "removed app.Model",
    ]


# nodes


async def register_node(registry: Registry, name: str, started_ms: int, *, is_alive: bool) -> None:
    record = NodeRecord(name, "host", 1, started_ms)
    await registry.client.hset(ALL.nodes, name, registry.signer.write(record, name))
    await registry.assign(name, {"app.Model": Planned(2, "v1")})
    if is_alive:
        await run(registry.client, control_scripts.renew([ALL.node_lease(name)], 60, name))


async def test_node_without_lease_is_not_listed_and_forgotten_after_a_minute(
    redis: Control, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    await register_node(registry, "alive", 0, is_alive=True)
    await register_node(registry, "gone", 0, is_alive=False)

    at_first = await registry.nodes()
    known = await redis.hkeys(ALL.nodes)
    monkeypatch.setattr(registry_module, "NODE_KEPT_S", 0)
    later = await registry.nodes()

    assert set(at_first) == set(later) == {"alive"}
    assert set(known) == {b"alive", b"gone"}
    assert await redis.hkeys(ALL.nodes) == [b"alive"]
    assert not await redis.exists(ALL.node_plan("gone"))


async def test_node_that_comes_back_after_an_outage_still_has_its_plan(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    await register_node(registry, "n-1", 0, is_alive=False)  # the outage was longer than its lease
    await registry.nodes()
    await run(registry.client, control_scripts.renew([ALL.node_lease("n-1")], 60, "n-1"))
    await registry.nodes()
    await registry.client.delete(ALL.node_lease("n-1"))
    monkeypatch.setattr(registry_module, "NODE_KEPT_S", 0)

    await registry.nodes()

    assert await registry.plan("n-1") == {"app.Model": Planned(2, "v1")}


async def test_node_that_left_a_moment_ago_gets_no_plan_that_nobody_would_delete(
    redis: Control, registry: Registry
) -> None:
    await register_node(registry, "n-1", 0, is_alive=True)
    await redis.hdel(ALL.nodes, "n-1")  # as its launcher does when it ends
    await redis.delete(ALL.node_plan("n-1"))

    await registry.assign("n-1", {"app.Model": Planned(2, "v1")})

    assert not await redis.exists(ALL.node_plan("n-1"))


async def test_plan_says_what_was_assigned_and_not_unassigned(registry: Registry) -> None:
    await register_node(registry, "n-1", 0, is_alive=True)
    await registry.assign("n-1", {"app.Other": Planned(3, "v2"), "app.Model": Planned(2, "v1")})
    await registry.assign("n-1", {"app.Model": Planned(1, "v1")})
    await registry.unassign("n-1", "app.Other")

    assert await registry.plan("n-1") == {"app.Model": Planned(1, "v1")}


# what was refused


async def test_refused_config_is_taken_back_and_the_view_says_why(registry: Registry) -> None:
    first = await registry.deploy("app", "Model", [coded("a", num_replicas=1)])
    works_by = await registry.current("app.Model")
    assert works_by is not None
    second = await registry.deploy("app", "Model", [coded("a", num_replicas=2)])

    answer = await registry.withdraw("app.Model", second.version, works_by, "it raised", "Traceback ...")

    seen = await view(registry)
    assert answer is control_scripts.Withdrawn.WITHDRAWN
    assert await registry.current("app.Model") == works_by
    assert (seen.version, seen.revision, seen.failure) == (first.version, first.version, "")
    assert (seen.refused, seen.refusal, seen.refusal_traceback) == (second.version, "it raised", "Traceback ...")
    assert seen.trouble == "the last deploy was taken back: it raised"


async def test_last_death_is_kept_until_the_next_deploy(registry: Registry) -> None:
    await registry.deploy("app", "Model", [coded("a")])
    await run(registry.client, control_scripts.decide(registry.keys_of("app.Model"), 1, 1, "", {}))

    await registry.note_death("app.Model", "r-1", "killed by signal 9")
    dead = await view(registry)
    await registry.deploy("app", "Model", [coded("a")])

    assert dead.last_death is not None
    assert (dead.last_death["replica"], dead.last_death["cause"]) == ("r-1", "killed by signal 9")
    assert dead.trouble == "replica r-1 has ended: killed by signal 9"
    assert (await view(registry)).last_death is None


# the view


@pytest.mark.parametrize(
    ("target", "replicas", "expected"),
    [
        (None, [], False),
        (0, [], True),
        (1, [], False),
        (2, [("new", "now", "RUNNING")], True),
        (1, [("new", "before", "RUNNING")], False),
        (2, [("new", "now", "RUNNING"), ("new", "before", "RUNNING")], False),
        (1, [("new", "now", "RUNNING"), ("old", "before", "RUNNING")], False),  # might take the next request
        (1, [("new", "now", "RUNNING"), ("old", "before", "DRAINING")], True),
        (1, [("new", "now", "RUNNING"), ("new", "before", "DRAINING")], True),
        (1, [("old", "before", "RUNNING")], False),
    ],
)
def test_deployment_is_up_when_all_that_take_requests_go_by_its_version_and_config(
    target: int | None, replicas: list[tuple[str, str, str]], expected: bool
) -> None:
    records = [
        ReplicaRecord(f"r-{n}", "node", 1, version, state, 0, revision=revision)
        for n, (version, revision, state) in enumerate(replicas)
    ]
    seen = DeploymentView(
        "app", "Model", "new", DeploymentConfig(), target is not None, target or 0, "", "", "", None, records,
        control_scripts.Backlog(), revision="now",
    )  # fmt: skip

    assert seen.is_up is expected


async def test_the_dead_are_not_waited_for(redis: Control, keys: DeploymentKeys, registry: Registry) -> None:
    first = await registry.deploy("app", "Model", [coded("a")])
    await run(redis, control_scripts.decide(keys, 1, 1, "", {}))
    await add_replica(registry, keys, "r-dead", version=first.version)
    await redis.delete(keys.lease("r-dead"))
    second = await registry.deploy("app", "Model", [coded("a")])
    alive = ReplicaRecord("r-alive", "n-1", 1, first.version, "RUNNING", 0, revision=second.version)
    await redis.hset(keys.replicas, "r-alive", registry.signer.write(alive, keys.tag, "r-alive"))
    await run(redis, control_scripts.renew([keys.lease("r-alive")], 60, "launcher"))

    seen = await view(registry)

    assert not seen.is_up
    assert (await registry.without_the_dead(seen)).replicas == [alive]
    assert (await registry.without_the_dead(seen)).is_up


async def test_nothing_is_seen_where_nothing_is_deployed(registry: Registry) -> None:
    assert await registry.view("app", "Model") is None
    assert await registry.views() == []


async def test_views_are_of_all_deployments_in_their_order(registry: Registry) -> None:
    names = [f"D{number}" for number in range(12)]
    await registry.deploy("b", "D0", [new(name) for name in names])
    await registry.deploy("a", "Model", [new("Model")])

    assert [one.tag for one in await registry.views()] == ["a.Model", *(f"b.{name}" for name in names)]


async def test_view_holds_config_decision_backlog_and_replicas(
    redis: Control, keys: DeploymentKeys, registry: Registry
) -> None:
    record = await registry.deploy("app", "Model", [new(max_attempts=7)])
    await run(redis, control_scripts.decide(keys, 1, 3, "backlog grows", {"waiting": 5}))
    await seed_queued(redis, keys, 5)
    await add_replica(registry, keys, "r-2", version=record.version)
    await add_replica(registry, keys, "r-1", version=record.version, state="STARTING")

    seen = await view(registry)

    assert (seen.config.max_attempts, seen.target, seen.reason) == (7, 3, "backlog grows")
    assert seen.backlog.waiting == 5
    assert [replica.replica for replica in seen.replicas] == ["r-1", "r-2"]
    assert [replica.replica for replica in seen.running] == ["r-2"]
    (decision,) = await registry.decisions("app.Model")
    assert decision.pop("at_ms").isdigit()
    assert decision == {"target": "3", "reason": "backlog grows", "waiting": "5"}


@pytest.mark.parametrize(
    ("target", "replicas", "status"),
    [
        (None, [], "UPDATING"),
        (0, [], "HEALTHY"),
        (1, [("new", "RUNNING")], "HEALTHY"),
        (1, [("new", "STARTING")], "UPDATING"),
        (1, [("new", "RUNNING"), ("old", "DRAINING")], "UPDATING"),
        (3, [("new", "RUNNING")], "UPSCALING"),
        (1, [("new", "RUNNING"), ("new", "RUNNING")], "DOWNSCALING"),
        (1, [("new", "RUNNING"), ("new", "DRAINING")], "DOWNSCALING"),
        (2, [("new", "RUNNING"), ("of another config", "RUNNING")], "UPDATING"),
    ],
)
async def test_status_is_ray_serves_word_for_it(
    redis: Control,
    keys: DeploymentKeys,
    registry: Registry,
    target: int | None,
    replicas: list[tuple[str, str]],
    status: str,
) -> None:
    record = await registry.deploy("app", "Model", [new()])
    if target is not None:
        await run(redis, control_scripts.decide(keys, 1, target, "", {}))
    for number, (age, state) in enumerate(replicas):
        version = "before" if age == "old" else record.version
        await add_replica(registry, keys, f"r-{number}", version=version, state=state)
        if age == "of another config":
            changed = replace((await view(registry)).replicas[number], revision="before")
            await redis.hset(keys.replicas, changed.replica, registry.signer.write(changed, keys.tag, changed.replica))

    assert (await view(registry)).status == status


async def test_failure_to_start_is_shown_until_the_next_version(registry: Registry) -> None:
    record = await registry.deploy("app", "Model", [new()])

    await registry.fail("app.Model", record.version, "its constructor raised", "Traceback ...")
    failed = await view(registry)
    await registry.deploy("app", "Model", [new()])
    deployed_again = await view(registry)

    assert (failed.status, failed.failure, failed.traceback) == (
        "DEPLOY_FAILED",
        "its constructor raised",
        "Traceback ...",
    )
    assert (deployed_again.failure, deployed_again.status) == ("", "UPDATING")


async def test_failure_of_a_former_version_is_not_recorded(registry: Registry) -> None:
    before = await registry.deploy("app", "Model", [new()])
    await registry.deploy("app", "Model", [new()])

    await registry.fail("app.Model", before.version, "its constructor raised", "Traceback ...")

    assert (await view(registry)).failure == ""


async def test_override_is_an_operators_word_until_it_is_taken_back(registry: Registry) -> None:
    await registry.deploy("app", "Model", [new()])

    await registry.override("app.Model", {"min_replicas": 1, "max_replicas": 2})
    overridden = await view(registry)
    await registry.override("app.Model", None)

    assert overridden.override == {"min_replicas": 1, "max_replicas": 2}
    assert (await view(registry)).override is None
