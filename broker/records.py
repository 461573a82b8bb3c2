"""What is deployed, on which nodes, by which replicas, as values: records as they are stored, and a view of one deployment."""

import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from millstream.broker.control_scripts import Backlog
from millstream.broker.keys import deployment_tag
from millstream.config import DeploymentConfig

R = TypeVar("R")
# What parsing of some other program's text may raise. ConfigError is a ValueError.
NOT_OURS = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


def read_record(cls: type[R], text: bytes | str) -> R:
    """A record as it is stored. Raises ValueError if it is none: then some other program wrote it."""
    try:
        values: dict[str, Any] = json.loads(text)
        hints = _hints(cls)  # type: ignore[arg-type] # mypy: a class is hashable
        if wrong := [name for name, value in values.items() if not _fits(value, hints[name])]:
            raise ValueError(f"{wrong[0]} is {values[wrong[0]]!r:.100}")
        return cls(**values)
    except NOT_OURS as e:
        raise ValueError(f"no {cls.__name__}: {e!r:.200}") from None


def read_config(text: bytes | str) -> DeploymentConfig:
    """A config as it is stored. Raises ValueError if it is none."""
    try:
        return DeploymentConfig.from_json(text)
    except NOT_OURS as e:
        raise ValueError(f"no config: {e!r:.200}") from None


def read_json_object(text: bytes | str) -> dict[str, Any]:
    """Raises ValueError if it is none."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("too deep for JSON of ours") from None
    if not isinstance(found, dict):
        raise ValueError(f"no JSON object: {found!r:.100}")  # noqa: TRY004 - as whatever else it may be
    return found


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(one, get_args(hint)[0]) for one in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(one, get_args(hint)[1]) for one in value.values())
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


@dataclass(frozen=True, slots=True)
class AppRecord:
    """One application: the version that is deployed, its ingress, its deployments.

    `leaving`: deployment -> revision, of those that are no longer part of it and serve on until callers of its former
    versions are gone.
    """

    name: str
    version: str
    ingress: str
    deployments: list[str]
    deployed_ms: int = 0
    leaving: dict[str, str] = field(default_factory=dict)

    @property
    def tags(self) -> list[str]:
        return [deployment_tag(self.name, deployment) for deployment in self.deployments]

    @property
    def all_tags(self) -> list[str]:
        return [*self.tags, *(deployment_tag(self.name, deployment) for deployment in self.leaving)]


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """One replica as it describes itself."""

    replica: str
    node: str
    pid: int
    version: str
    state: str  # STARTING | RUNNING | DRAINING
    started_ms: int
    connections: list[int] = field(default_factory=list)  # client ids on the server, to be killed before a release
    revision: str = ""  # of the config that it works by


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """One launcher."""

    node: str
    host: str
    pid: int
    started_ms: int


@dataclass(frozen=True, slots=True)
class NewDeployment:
    """What `deploy` stores of one deployment."""

    name: str
    config: DeploymentConfig
    definition: bytes
    code: str = ""  # its fingerprint; where it is as before, replicas stay. Empty: unknown, they are replaced


class Planned(NamedTuple):
    """What a node should run of one deployment."""

    replicas: int
    version: str
    revision: str = ""


class Current(NamedTuple):
    """What is in force for a deployment: replicas of another version are replaced, of another revision told."""

    version: str
    revision: str
    config: DeploymentConfig


@dataclass(slots=True)
class DeploymentView:
    """One deployment as it is in Redis now."""

    app: str
    name: str
    version: str
    config: DeploymentConfig
    has_target: bool  # False until the autoscaler has seen it
    target: int
    reason: str
    failure: str  # why it cannot start; empty when it can
    traceback: str
    override: dict[str, Any] | None  # an operator's num_replicas or min / max
    replicas: list[ReplicaRecord]
    backlog: Backlog
    revision: str = ""  # of the config
    refused: str = ""  # a revision that was taken back: a replica could not take it over
    refusal: str = ""  # why
    refusal_traceback: str = ""
    last_death: dict[str, Any] | None = None  # replica, cause, at_ms: since this revision was deployed

    @property
    def tag(self) -> str:
        return deployment_tag(self.app, self.name)

    @property
    def running(self) -> list[ReplicaRecord]:
        return [r for r in self.replicas if r.state == "RUNNING" and r.version == self.version]

    @property
    def is_up(self) -> bool:
        """Does it serve its present version by its present config, and no former one, as far as it should serve at all?"""
        if any(r.version != self.version and r.state != "DRAINING" for r in self.replicas):
            return False
        if not self.has_target or self.target == 0:
            return self.has_target
        return bool(self.running) and all(r.revision == self.revision for r in self.running)

    @property
    def trouble(self) -> str:
        """What an operator should know although it serves; empty if there is nothing."""
        if self.refused:
            return f"the last deploy was taken back: {self.refusal}"
        if self.last_death and len(self.running) < self.target:
            return f"replica {self.last_death['replica']} has ended: {self.last_death['cause']}"
        return ""

    @property
    def status(self) -> str:
        """Ray Serve's word for the state: UPDATING, HEALTHY, DEPLOY_FAILED, UPSCALING or DOWNSCALING."""
        if self.failure:
            return "DEPLOY_FAILED"
        if not self.has_target:
            return "UPDATING"
        if any(r.revision != self.revision for r in self.running):
            return "UPDATING"
        running, others = len(self.running), len(self.replicas) - len(self.running)
        if running == self.target and not others:
            return "HEALTHY"
        if any(r.version != self.version for r in self.replicas) or (running == 0 and self.target > 0):
            return "UPDATING"
        return "UPSCALING" if running < self.target else "DOWNSCALING"
