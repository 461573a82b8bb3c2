"""Whether another version of a deployment serves, or is to come."""

from typing import Any

import pytest

from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys
from millstream.broker.records import ReplicaRecord
from millstream.broker.signed import Signer
from millstream.config import Settings
from millstream.replicas.versions import OtherVersions

pytestmark = pytest.mark.anyio
GARBAGE = "garbage"


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
    settings: Settings,
    keys: DeploymentKeys,
    replicas: list[str],
    config: dict[Any, Any],
    failed: str | None,
    expected: bool,
) -> None:
    for number, version in enumerate(replicas):
        record, name = ReplicaRecord(f"r-{number}", "n-1", 1, version, "RUNNING", 0), f"r-{number}"
        signed = Signer(settings).write(record, keys.tag, name)
        await redis.hset(keys.replicas, name, signed if version != GARBAGE else GARBAGE)
    if config:
        await redis.hset(keys.config, mapping=config)
    if failed is not None:
        await redis.hset(keys.status, "failed_revision", failed)

    assert await OtherVersions(keys, Signer(settings), "v1", redis.execute_command).are_there() is expected
    await redis.flushall()
