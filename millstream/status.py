"""What `serve.status()` returns: Ray Serve's shape and words, with each replica's pid, node and state."""

from dataclasses import asdict, dataclass
from typing import Any

from millstream.broker.records import AppRecord, DeploymentView


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    replica_id: str
    pid: int
    node: str
    state: str


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """`status`: UPDATING, HEALTHY, DEPLOY_FAILED, UPSCALING or DOWNSCALING."""

    status: str
    message: str
    replica_states: dict[str, int]
    target_replicas: int
    waiting: int
    in_flight: int
    parked: int
    delayed: int
    replicas: list[ReplicaStatus]
    last_death: dict[str, Any] | None = None  # replica, cause, at_ms; since the last deploy


@dataclass(frozen=True, slots=True)
class ApplicationStatus:
    """`status`: DEPLOYING, RUNNING or DEPLOY_FAILED."""

    status: str
    message: str
    last_deployed_time_s: float
    deployments: dict[str, DeploymentStatus]


@dataclass(frozen=True, slots=True)
class ServeStatus:
    applications: dict[str, ApplicationStatus]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def summarise(apps: dict[str, AppRecord], views: list[DeploymentView]) -> ServeStatus:
    """From the control plane's records to what a person asks for."""
    return ServeStatus(
        {name: _application(record, [view for view in views if view.app == name]) for name, record in apps.items()}
    )


def _application(record: AppRecord, views: list[DeploymentView]) -> ApplicationStatus:
    failed = [view for view in views if view.failure]
    if failed:
        status, message = "DEPLOY_FAILED", f"{failed[0].name}: {failed[0].failure}"
    elif all(view.is_up for view in views):
        status, message = "RUNNING", ""
    else:
        status, message = "DEPLOYING", f"waiting for {', '.join(view.name for view in views if not view.is_up)}"
    return ApplicationStatus(
        status, message, record.deployed_ms / 1000, {view.name: _deployment(view) for view in views}
    )


def _deployment(view: DeploymentView) -> DeploymentStatus:
    states: dict[str, int] = {}
    for replica in view.replicas:
        states[replica.state] = states.get(replica.state, 0) + 1
    return DeploymentStatus(
        status=view.status,
        message=view.failure or view.trouble or view.reason,
        replica_states=states,
        target_replicas=view.target,
        waiting=view.backlog.waiting,
        in_flight=view.backlog.in_flight,
        parked=view.backlog.parked,
        delayed=view.backlog.delayed,
        replicas=[ReplicaStatus(r.replica, r.pid, r.node, r.state) for r in view.replicas],
        last_death=view.last_death,
    )
