"""Looks made up for pure tests."""

from typing import Any

from millstream.broker.control_scripts import Backlog
from millstream.broker.records import AppRecord, DeploymentView, NodeRecord, ReplicaRecord
from millstream.config import DeploymentConfig
from millstream.dashboard.reading import Look

INFO = {
    "redis_version": "7.0.15", "uptime_in_seconds": 60, "role": "master", "used_memory": 1000, "maxmemory": 0,
    "maxmemory_policy": "noeviction", "aof_enabled": 1, "connected_clients": 3,
}  # fmt: skip
NODE = NodeRecord("mill-1", "mill.example", 4711, 500)


def make_replica(replica: str, state: str = "RUNNING", version: str = "v1") -> ReplicaRecord:
    return ReplicaRecord(replica, NODE.node, 5000, version, state, 900)


def make_view(name: str = "Model", **changes: Any) -> DeploymentView:
    values = {
        "app": "shop", "version": "v1", "config": DeploymentConfig(), "has_target": True, "target": 1,
        "reason": "num_replicas=1", "failure": "", "traceback": "", "override": None,
        "replicas": [make_replica("r-1")], "backlog": Backlog(),
    }  # fmt: skip
    return DeploymentView(name=name, **{**values, **changes})


def make_look(*views: DeploymentView, **changes: Any) -> Look:
    """A healthy server, node and autoscaler, and these deployments."""
    values = {
        "at_ms": 1000, "took_s": 0.002, "info": INFO, "views": list(views), "dead": {},
        "apps": {"shop": AppRecord("shop", "v1", "Model", [view.name for view in views])},
        "nodes": [NODE], "alive": frozenset({NODE.node}), "leader": "a1b2c3d4 7",
    }  # fmt: skip
    return Look(**{**values, **changes})
