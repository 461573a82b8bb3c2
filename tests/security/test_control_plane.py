"""Somebody writes over the records of the control plane: who reads them says so once, goes on, and recovers when they are
mended. None of them unpickles anything."""

import json
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
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
from millstream.broker.sweeper import Sweeper
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
