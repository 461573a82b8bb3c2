"""Somebody writes over the records of the control plane: who reads them says so once, goes on, and recovers when they are
mended. None of them unpickles anything."""

import json
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.autoscaler.autoscaler import Autoscaler
from millstream.broker import control_scripts, dead_letters
from millstream.broker.connection import ANY_TROUBLE, Control, run
from millstream.broker.keys import DeploymentKeys, Keys
from millstream.broker.lookup import view_request
from millstream.broker.records import (
    AppRecord,
    NewDeployment,
    NodeRecord,
    Planned,
    ReplicaRecord,
    read_config,
    read_record,
)
from millstream.broker.registry import Registry
from millstream.broker.signed import Signer
from millstream.broker.supplying import Supplier
from millstream.broker.sweeper import Sweeper, bury
from millstream.config import DeploymentConfig, Settings
from millstream.dashboard.feed import Feed
from millstream.dashboard.reading import look
from millstream.errors import MillstreamError
from tests.security.hostile import GARBAGE, fuzzed, nothing_is_loaded

pytestmark = pytest.mark.anyio
ALL, MODEL = Keys("ms"), DeploymentKeys("ms", "app.Model")
RECORDS = (AppRecord, NodeRecord, Planned, ReplicaRecord)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
FIELDS = st.sampled_from(
    [
        "name", "version", "ingress", "deployments", "deployed_ms", "leaving", "node", "host", "pid", "started_ms", "replicas",
        "revision", "replica", "state", "connections", "num_replicas", "autoscaling", "retry", "user_config", "result_ttl_s",
    ]
)  # fmt: skip


@fuzzed(400)
@given(st.sampled_from(RECORDS), st.one_of(GARBAGE, st.dictionaries(FIELDS, JSON, max_size=6).map(json.dumps)))
def test_record_is_what_its_types_say_or_refused(cls: Any, text: bytes | str) -> None:
    try:
        record: Any = read_record(cls, text)
    except ValueError:
        return
    assert isinstance(record, cls)
    for name in getattr(cls, "_fields", None) or cls.__slots__:
        assert isinstance(getattr(record, name), str | int | list | dict)


@fuzzed(200)
@given(st.one_of(GARBAGE, st.dictionaries(FIELDS, JSON, max_size=6).map(json.dumps)))
def test_config_is_one_or_refused(text: bytes | str) -> None:
    with suppress(ValueError):
        assert isinstance(read_config(text), DeploymentConfig)


# the readers


@pytest.fixture
async def registry(redis: Control, settings: Settings) -> AsyncIterator[Registry]:
    """One deployment with a replica that lives, on a node that lives."""
    registry = Registry(redis, settings)
    await registry.deploy("app", "Model", [NewDeployment("Model", DeploymentConfig(num_replicas=2), b"")])
    now_ms = await registry.now_ms()
    node = NodeRecord("here", "h", 1, now_ms)
    await run(redis, control_scripts.enlist(ALL.nodes, "here", registry.signer.write(node, "here")))
    await redis.set(ALL.node_lease("here"), "here", ex=600)
    replica = ReplicaRecord("r-1", "here", 1, "v", "RUNNING", now_ms)
    await run(redis, control_scripts.enlist(MODEL.replicas, "r-1", registry.signer.write(replica, "app.Model", "r-1")))
    await redis.set(MODEL.lease("r-1"), "here", ex=600)
    yield registry
    await redis.flushall()


@pytest.fixture
async def autoscaler(settings: Settings) -> AsyncIterator[Autoscaler]:
    autoscaler = Autoscaler(settings)
    yield autoscaler
    await autoscaler._client.aclose()


FIELD_OF = {
    ALL.apps: "app", ALL.nodes: "here", ALL.node_plan("here"): "app.Model", MODEL.config: "config", MODEL.status: "target",
    MODEL.replicas: "r-1",
}  # fmt: skip


async def read_all(registry: Registry, settings: Settings, redis: Control) -> None:
    """As launchers, the CLI and the dashboard do; a clear error is an answer, too."""
    reads: list[Any] = [
        registry.apps(), registry.nodes(), registry.plan("here"), registry.current("app.Model"), registry.view("app", "Model"),
        registry.views(with_leaving=True), registry.of_version("app", "v"), registry.decisions("app.Model"), registry.retire(),
        registry.dead_count("app.Model"), dead_letters.find(registry, "app.Model~" + "r" * 22), view_request(registry, "app.Model~" + "r" * 22),
    ]  # fmt: skip
    for read in reads:
        with suppress(MillstreamError):
            await read
    latest = await Feed(settings, partial(look, redis, settings)).latest()
    assert latest.error == "" or "cannot be shown" in latest.error


@pytest.mark.parametrize(
    "text", [b"\xff\0", b"[" * 5000, b'{"no such field": 1}', b"[1]", b'{"name": 1, "replicas": "many"}', b"9" * 5000]
)
@pytest.mark.parametrize("key", FIELD_OF)
async def test_readers_survive_a_field_that_was_written_over_and_recover(
    registry: Registry, autoscaler: Autoscaler, redis: Control, settings: Settings, key: str, text: bytes,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    await autoscaler.step()
    field: Any = FIELD_OF[key]
    before: Any = await redis.hget(key, field)
    plan_before = await registry.plan("here")
    caplog.clear()

    with nothing_is_loaded(monkeypatch) as loaded:
        await redis.hset(key, field, text)
        for _ in range(3):
            await autoscaler.step()
        await read_all(registry, settings, redis)
        await Sweeper(settings, partial(run, redis), redis.execute_command).step("app.Model")

    assert loaded == []
    assert (await registry.plan("here", plan_before)) == plan_before, "what runs was taken back"
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR and r.name == "millstream.registry"]
    assert len(said) == len(set(said)) or len(said) <= 8, said
    assert not [r for r in caplog.records if r.exc_info], "a traceback"

    await redis.hset(key, field, before)
    (view,) = await autoscaler.step()
    assert (view.tag, view.target, [r.replica for r in view.replicas]) == ("app.Model", 2, ["r-1"])


# what bears no good signature


@dataclass(frozen=True)
class Stage:
    """Two nodes, two applications, two revisions; and what stood under each field before the present text did."""

    registry: Registry
    redis: Any

    async def texts(self, key: str, field: str) -> dict[str, bytes]:
        """What somebody without the secret can put into the place of a record."""
        genuine = await self.redis.hget(key, field)
        _, _, text = genuine.partition(b" ")
        found = {"unsigned": text, "altered": genuine[:-2] + b" " + genuine[-2:]}
        if key == MODEL.config:
            found["of another revision"] = await self.redis.get("former config")
            found["of another deployment"] = await self.redis.hget(OTHER.config, field)
        elif key == MODEL.status:
            found["of another deployment"] = await self.redis.hget(OTHER.status, field)
        elif key == MODEL.replicas:
            found["of another replica"] = await self.redis.hget(key, "r-2")
            found["of another deployment"] = await self.redis.hget(OTHER.replicas, field)
        elif key == ALL.node_plan("here"):
            found["of another node"] = await self.redis.hget(ALL.node_plan("there"), field)
            found["of another deployment"] = await self.redis.hget(key, OTHER.tag)
        elif key == ALL.nodes:
            found["of another node"] = await self.redis.hget(key, "there")
        else:
            found["of another application"] = await self.redis.hget(key, "other")
        return found

    async def seen(self) -> dict[str, Any]:
        """What readers go by. Of a deployment that cannot be read, that it cannot."""
        views: dict[str, Any] = {view.tag: view for view in await self.registry.views()}
        model = views.get(MODEL.tag)
        return {
            ALL.apps: sorted(await self.registry.apps()),
            ALL.nodes: sorted(await self.registry.nodes()),
            ALL.node_plan("here"): await self.registry.plan("here"),
            MODEL.config: await self.registry.current(MODEL.tag),
            MODEL.status: model.override if model else "not read",
            MODEL.replicas: [replica.replica for replica in model.replicas] if model else "not read",
        }


OTHER = DeploymentKeys("ms", "other.Model")
SIGNED = {
    ALL.apps: "app", ALL.nodes: "here", ALL.node_plan("here"): "app.Model", MODEL.config: "config", MODEL.status: "override",
    MODEL.replicas: "r-1",
}  # fmt: skip


@pytest.fixture
async def stage(registry: Registry, redis: Control) -> Stage:
    new = [NewDeployment("Model", DeploymentConfig(num_replicas=2, user_config={"threshold": 1}), b"", "code")]
    for app in ("app", "other"):
        await registry.deploy(app, "Model", new)
        await registry.override(f"{app}.Model", {"num_replicas": 3 if app == "app" else 30})
    former: Any = await redis.hget(MODEL.config, "config")
    await redis.set("former config", former, ex=600)
    await registry.deploy("app", "Model", new)
    for tag, replica in ((MODEL.tag, "r-1"), (MODEL.tag, "r-2"), (OTHER.tag, "r-1")):
        record = ReplicaRecord(replica, "here", 1, "v", "RUNNING", 0)
        await redis.hset(registry.keys_of(tag).replicas, replica, registry.signer.write(record, tag, replica))
    for node in ("here", "there"):
        await redis.hset(ALL.nodes, node, registry.signer.write(NodeRecord(node, "h", 1, 0), node))
        await redis.set(ALL.node_lease(node), node, ex=600)
        await registry.assign(node, {MODEL.tag: Planned(2 if node == "here" else 20, "v")})
        await registry.assign(node, {OTHER.tag: Planned(9, "v")})
    return Stage(registry, redis)


@pytest.mark.parametrize("key", SIGNED)
async def test_record_that_was_altered_moved_or_never_signed_is_not_obeyed(
    stage: Stage, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    field, before = SIGNED[key], await stage.seen()
    genuine = await stage.redis.hget(key, field)

    for how, text in (await stage.texts(key, field)).items():
        assert text and text != genuine, how
        caplog.clear()
        await stage.redis.hset(key, field, text)

        seen = await stage.seen()

        assert seen[key] != before[key], how
        assert "does not bear this installation's signature" in caplog.text, how
        match key:
            case MODEL.config | MODEL.status:
                assert seen[MODEL.status] == "not read"  # rather than obeyed
                assert MODEL.tag in stage.registry.unreadable
            case _:
                assert all(one in before[key] for one in seen[key]), "something that nobody had written"
        await stage.redis.hset(key, field, genuine)
        assert await stage.seen() == before, how


@pytest.mark.parametrize("field", ["revision", "version"])
async def test_genuine_config_beside_another_revision_or_version_is_not_obeyed(stage: Stage, field: str) -> None:
    genuine = await stage.redis.hget(MODEL.config, field)

    await stage.redis.hset(MODEL.config, field, "another")
    assert await stage.registry.current(MODEL.tag) is None
    await stage.redis.hset(MODEL.config, field, genuine)

    assert await stage.registry.current(MODEL.tag) is not None


@pytest.mark.parametrize("field", ["config", "revision", "version"])
async def test_next_deploy_mends_a_config(stage: Stage, field: str) -> None:
    former = await stage.registry.current(MODEL.tag)
    await stage.redis.hset(MODEL.config, field, b"\xff")

    new = NewDeployment("Model", DeploymentConfig(num_replicas=4), b"", "code")
    await stage.registry.deploy("app", "Model", [new])

    current = await stage.registry.current(MODEL.tag)
    assert current is not None and former is not None
    assert current.config.num_replicas == 4
    assert current.version != former.version, "a version that nobody has signed stays"


async def test_connections_that_a_forged_record_names_are_not_killed(stage: Stage, settings: Settings) -> None:
    mine: Any = await stage.redis.client_id()
    forged = json.dumps({"replica": "r-1", "node": "n", "pid": 1, "version": "v", "state": "RUNNING", "started_ms": 1,
                         "connections": [mine]})  # fmt: skip
    await stage.redis.hset(MODEL.replicas, "r-1", forged)
    run_it = partial(run, stage.redis)

    supplier, signer = Supplier(settings, run_it), Signer(settings)
    await bury(run_it, stage.redis.execute_command, supplier, signer, MODEL, "r-1", "killed", expired=False)

    assert await stage.redis.client_id() == mine
    assert not await stage.redis.hexists(MODEL.replicas, "r-1")


async def test_autoscaler_writes_a_forged_plan_anew(
    stage: Stage, autoscaler: Autoscaler, caplog: pytest.LogCaptureFixture
) -> None:
    await autoscaler.step()
    plans = [await stage.registry.plan(node) for node in ("here", "there")]
    await stage.redis.hset(ALL.node_plan("here"), MODEL.tag, b'{"replicas": 1000, "version": "v", "revision": ""}')

    await autoscaler.step()

    assert [await stage.registry.plan(node) for node in ("here", "there")] == plans


async def test_target_beyond_what_was_deployed_is_taken_back_before_it_is_placed(
    stage: Stage, autoscaler: Autoscaler
) -> None:
    """A script writes targets, and cannot sign them; configs and overrides bound them."""
    await autoscaler.step()
    await stage.redis.hset(MODEL.status, "target", "1000")

    await autoscaler.step()

    planned = [(await stage.registry.plan(node)).get(MODEL.tag) for node in ("here", "there")]
    assert sum(one.replicas for one in planned if one is not None) == 3


@pytest.mark.parametrize(
    "key", [*FIELD_OF, ALL.leader, ALL.fence, ALL.changes, MODEL.scaling, MODEL.lease("r-1"), ALL.node_lease("here")]
)
async def test_autoscaler_waits_for_the_mend_of_a_key_of_another_type(
    registry: Registry, autoscaler: Autoscaler, redis: Control, settings: Settings, key: str
) -> None:
    await autoscaler.step()
    before: Any = await redis.dump(key)
    await redis.delete(key)
    await redis.lpush(key, b"\xff\0garbage")

    with suppress(*ANY_TROUBLE):  # its loop waits then
        await autoscaler.step()
    await redis.delete(key)
    if before is not None:
        await redis.restore(key, 0, before)
    if key in (MODEL.lease("r-1"), ALL.node_lease("here"), ALL.leader):
        await redis.set(key, autoscaler.name + " 1" if key == ALL.leader else "here", ex=600)

    (view,) = await autoscaler.step()
    assert view.target == 2
