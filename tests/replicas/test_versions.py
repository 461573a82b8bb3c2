"""Whether another version of a deployment serves, or is to come."""

import json
from dataclasses import asdict
from typing import Any

import pytest

from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys
from millstream.broker.records import ReplicaRecord
from millstream.replicas.versions import OtherVersions

pytestmark = pytest.mark.anyio
GARBAGE = "garbage"


def _record(version: str) -> str:
    if version == GARBAGE:
        return "{no JSON"
    return json.dumps(asdict(ReplicaRecord("r", "node", 1, version, "RUNNING", 0)))


@pytest.mark.parametrize(
    ("replicas", "config", "failed", "expected"),
    [
        (["v1"], {"version": "v1", "revision": "a"}, None, False),
        (["v1", "v2"], {"version": "v2", "revision": "b"}, None, True),
        (["v1"], {"version": "v2", "revision": "b"}, None, True),
        (["v1"], {"version": "v2", "revision": "b"}, "b", False),
        (["v1"], {"version": "v2", "revision": "b"}, "a", True),
        (["v1", "v0"], {"version": "v1", "revision": "a"}, None, True),
        (["v1"], {}, None, False),
        ([], {"version": "v1", "revision": "a"}, None, False),
        (["v1", GARBAGE], {"version": "v1", "revision": "a"}, None, False),
    ],
    ids=["only us", "both serve", "the next is to come", "the next cannot start", "it could not start before",
         "the former serves", "deleted", "nobody is listed", "garbage"],
)  # fmt: skip
async def test_others_are_those_that_serve_and_those_to_come(
    redis: Control,
    keys: DeploymentKeys,
    replicas: list[str],
    config: dict[Any, Any],
    failed: str | None,
    expected: bool,
) -> None:
    for number, version in enumerate(replicas):
        await redis.hset(keys.replicas, f"r-{number}", _record(version))
    if config:
        await redis.hset(keys.config, mapping=config)
    if failed is not None:
        await redis.hset(keys.status, "failed_revision", failed)

    assert await OtherVersions(keys, "v1", redis.execute_command).are_there() is expected
    await redis.flushall()
