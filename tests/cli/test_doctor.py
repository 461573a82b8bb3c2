"""What doctor makes of a server's INFO and of a deployment. Pure."""

from typing import Any

import pytest

from millstream.broker.control_scripts import Backlog
from millstream.broker.records import DeploymentView, ReplicaRecord
from millstream.cli.doctor import Verdict, eviction, flavour, memory, persistence, replicas, size, stalled
from millstream.config import DeploymentConfig, Settings

GOOD, DOUBTFUL, BAD = Verdict.GOOD, Verdict.DOUBTFUL, Verdict.BAD
SETTINGS = Settings("redis://:hunter2@somewhere:6379")


@pytest.mark.parametrize(
    ("info", "verdict", "text"),
    [
        ({"redis_version": "7.2.4", "valkey_version": "9.1.0"}, GOOD, "Valkey 9.1.0 at redis://***@somewhere:6379"),
        ({"redis_version": "7.0.15"}, GOOD, "Redis 7.0.15"),
        ({"redis_version": "8.2.1"}, GOOD, "Redis 8.2.1"),
        ({"redis_version": "6.2.14"}, BAD, "too old"),
        ({"redis_version": "7.4.0", "dragonfly_version": "1.2"}, DOUBTFUL, "not tested"),
    ],
)
def test_flavour(info: dict[str, Any], verdict: Verdict, text: str) -> None:
    finding = flavour(info, SETTINGS)

    assert finding.verdict is verdict and text in finding.text
    assert "hunter2" not in finding.text


@pytest.mark.parametrize(("policy", "verdict"), [("noeviction", GOOD), ("volatile-ttl", BAD), ("allkeys-lru", BAD)])
def test_eviction(policy: str, verdict: Verdict) -> None:
    assert eviction({"maxmemory_policy": policy}).verdict is verdict


@pytest.mark.parametrize(
    ("used", "limit", "verdict"), [(10**6, 0, GOOD), (50, 100, GOOD), (80, 100, DOUBTFUL), (95, 100, BAD)]
)
def test_memory(used: int, limit: int, verdict: Verdict) -> None:
    assert memory({"used_memory": used, "maxmemory": limit}).verdict is verdict


@pytest.mark.parametrize(
    ("info", "save", "verdict", "text"),
    [
        ({"aof_enabled": 1, "aof_last_write_status": "ok"}, "", GOOD, "is on"),
        ({"aof_enabled": 1, "aof_last_write_status": "err"}, "", BAD, "disk full"),
        ({"aof_enabled": 0}, "", DOUBTFUL, "loses everything"),
        ({"aof_enabled": 0}, "3600 1", DOUBTFUL, "after the last snapshot"),
        ({"aof_enabled": 0}, None, DOUBTFUL, "after the last snapshot"),
        ({"aof_enabled": 0, "rdb_last_bgsave_status": "err"}, "3600 1", BAD, "refuse writes"),
    ],
)
def test_persistence(info: dict[str, Any], save: str | None, verdict: Verdict, text: str) -> None:
    finding = persistence(info, save)

    assert finding.verdict is verdict and text in finding.text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (250_000, "250 kB"), (3 * 10**13, "30.0 TB")]
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


def view(**changes: Any) -> DeploymentView:
    values = {
        "app": "app", "name": "Model", "version": "v", "config": DeploymentConfig(), "has_target": True, "target": 1,
        "reason": "num_replicas=1", "failure": "", "traceback": "", "override": None, "replicas": [],
        "backlog": Backlog(), **changes,
    }  # fmt: skip
    return DeploymentView(**values)


def replica(state: str, version: str = "v") -> ReplicaRecord:
    return ReplicaRecord("r-1", "node", 1, version, state, 0)


@pytest.mark.parametrize(
    ("deployment", "verdict", "text"),
    [
        (view(replicas=[replica("RUNNING")]), None, ""),
        (view(target=0), None, ""),
        (view(target=0, backlog=Backlog(waiting=3)), DOUBTFUL, "zero replicas (num_replicas=1), 3 requests waiting"),
        (view(replicas=[replica("STARTING")]), DOUBTFUL, "one is starting"),
        (view(replicas=[replica("RUNNING", "old")]), BAD, "no replica"),
        (view(backlog=Backlog(waiting=1)), BAD, "no replica, 1 request waiting"),
        (view(has_target=False, target=0), BAD, "no replica"),
        (view(failure="no weights"), BAD, "cannot start: no weights"),
    ],
)
def test_replicas(deployment: DeploymentView, verdict: Verdict | None, text: str) -> None:
    finding = replicas(deployment)

    assert (finding.verdict if finding else None) is verdict
    assert text in (finding.text if finding else "")


@pytest.mark.parametrize(
    ("backlog", "config", "is_stalled"),
    [
        (Backlog(waiting=3, in_flight=0, oldest_waiting_s=120.0), DeploymentConfig(), True),
        (Backlog(waiting=3, in_flight=1, oldest_waiting_s=120.0), DeploymentConfig(), False),
        (Backlog(waiting=3, in_flight=1, oldest_waiting_s=120.0), DeploymentConfig(max_ongoing_requests=5), True),
        (Backlog(waiting=3, in_flight=0, oldest_waiting_s=5.0), DeploymentConfig(), False),
        (Backlog(), DeploymentConfig(), False),
    ],
)
def test_stalled(backlog: Backlog, config: DeploymentConfig, is_stalled: bool) -> None:
    finding = stalled(view(replicas=[replica("RUNNING")], backlog=backlog, config=config))

    assert (finding is not None) is is_stalled
    if finding is not None:
        assert finding.verdict is DOUBTFUL and "oldest of 3 requests has been waiting for 2 min" in finding.text
    assert stalled(view(backlog=backlog, config=config)) is None
