"""From what was read to what is shown: the JSON of `/api/snapshot` is these classes, field by field. Pure.

Payloads, arguments and `user_config` have no place here.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from millstream.broker.records import AppRecord, DeploymentView, ReplicaRecord
from millstream.config import Settings, redact
from millstream.dashboard.rates import Rates
from millstream.dashboard.reading import Look

NEARLY_FULL = 0.9  # of maxmemory: at 1.0 submits are refused
LATE_S = 15.0  # a request that waits so long although its deployment has replicas: worth a line


@dataclass(frozen=True, slots=True)
class Problem:
    """Something an operator should do something about."""

    level: Literal["error", "warning"]
    text: str


@dataclass(frozen=True, slots=True)
class Server:
    """The Redis server, as far as requests depend on it."""

    url: str  # without the password
    namespace: str
    kind: str  # "Redis" or "Valkey"
    version: str
    uptime_s: int
    role: str
    used_memory_bytes: int
    maxmemory_bytes: int | None  # None: no limit
    eviction_policy: str
    is_aof_on: bool
    connected_clients: int
    read_ms: float  # how long it took to read all of this


@dataclass(frozen=True, slots=True)
class Node:
    """One launcher. `is_alive` is False when its lease has run out."""

    node: str
    host: str
    pid: int
    started_ms: int
    is_alive: bool
    replicas: int


@dataclass(frozen=True, slots=True)
class Leader:
    """The autoscaler that decides, and its fencing number."""

    name: str
    fence: int


@dataclass(frozen=True, slots=True)
class Limits:
    """Between what the autoscaler may choose, and who said so."""

    min: int
    max: int
    set_by: Literal["config", "operator"]


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica process. `is_current` is False while one of an older version drains."""

    replica: str
    node: str
    pid: int
    state: str
    started_ms: int
    is_current: bool


@dataclass(frozen=True, slots=True)
class Deployment:
    """One line of the table, and what it opens to."""

    tag: str
    app: str
    name: str
    version: str
    status: str
    reason: str
    failure: str
    traceback: str
    waiting: int
    in_flight: int
    parked: int
    delayed: int
    oldest_waiting_s: float | None
    arrivals_per_s: float | None  # None: one look is not enough
    completions_per_s: float | None
    running: int
    target: int | None  # None: no autoscaler has seen it yet
    limits: Limits
    policy: str  # "fixed", "backlog" or "ray"
    max_ongoing_requests: int | None
    max_attempts: int
    dead_letters: int
    replicas: list[Replica]


@dataclass(frozen=True, slots=True)
class Totals:
    """All deployments together."""

    waiting: int
    in_flight: int
    parked: int
    delayed: int
    dead_letters: int
    arrivals_per_s: float | None
    completions_per_s: float | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that is shown, at one time. Times are the server's."""

    taken_ms: int
    server: Server
    nodes: list[Node]
    autoscaler: Leader | None
    problems: list[Problem]
    totals: Totals
    applications: list[AppRecord]
    deployments: list[Deployment]


@dataclass(frozen=True, slots=True)
class Decision:
    """One scaling decision as it is on record. `was` is None for the first one."""

    at_ms: int
    was: int | None
    target: int
    reason: str
    by: str
    inputs: dict[str, str]

    @classmethod
    def from_record(cls, record: Mapping[str, str]) -> Self:
        """From an entry of the deployment's `scaling` stream. Inputs that were unknown are left out."""
        known = ("at_ms", "was", "target", "reason", "by")
        return cls(
            at_ms=int(record["at_ms"]),
            was=int(record["was"]) if record.get("was") else None,
            target=int(record["target"]),
            reason=record["reason"],
            by=record.get("by", ""),
            inputs={name: value for name, value in record.items() if name not in known and value != ""},
        )


def shape(look: Look, rates: Mapping[str, Rates], settings: Settings) -> Snapshot:
    """One look and the rates by deployment tag, as they are shown."""
    server = _server(look, settings)
    leader = _leader(look.leader)
    deployments = [_deployment(view, rates.get(view.tag, Rates()), look.dead.get(view.tag, 0)) for view in look.views]
    nodes = _nodes(look)
    problems = [
        *_server_problems(server),
        *_control_problems(nodes, leader, bool(deployments)),
        *_deployment_problems(deployments),
    ]
    return Snapshot(
        taken_ms=look.at_ms,
        server=server,
        nodes=nodes,
        autoscaler=leader,
        problems=sorted(problems, key=lambda problem: problem.level != "error"),
        totals=_totals(deployments),
        applications=list(look.apps.values()),
        deployments=deployments,
    )


def _server(look: Look, settings: Settings) -> Server:
    info = look.info
    is_valkey = "valkey_version" in info  # its redis_version says 7.2.4, for the sake of old clients
    return Server(
        url=redact(settings.url),
        namespace=settings.namespace,
        kind="Valkey" if is_valkey else "Redis",
        version=str(info["valkey_version"] if is_valkey else info.get("redis_version", "?")),
        uptime_s=int(info.get("uptime_in_seconds", 0)),
        role=str(info.get("role", "?")),
        used_memory_bytes=int(info.get("used_memory", 0)),
        maxmemory_bytes=int(info.get("maxmemory", 0)) or None,
        eviction_policy=str(info.get("maxmemory_policy", "?")),
        is_aof_on=bool(info.get("aof_enabled", 0)),
        connected_clients=int(info.get("connected_clients", 0)),
        read_ms=round(look.took_s * 1000, 1),
    )


def _leader(text: str | None) -> Leader | None:
    name, _, fence = (text or "").partition(" ")
    return Leader(name, int(fence)) if fence.isdigit() else None


def _nodes(look: Look) -> list[Node]:
    replicas = Counter(replica.node for view in look.views for replica in view.replicas)
    return [
        Node(record.node, record.host, record.pid, record.started_ms, record.node in look.alive, replicas[record.node])
        for record in look.nodes
    ]


def _deployment(view: DeploymentView, rates: Rates, dead_letters: int) -> Deployment:
    backlog, config = view.backlog, view.config
    return Deployment(
        tag=view.tag,
        app=view.app,
        name=view.name,
        version=view.version,
        status=view.status,
        reason=view.trouble or view.reason,
        failure=view.failure,
        traceback=view.traceback,
        waiting=backlog.waiting,
        in_flight=backlog.in_flight,
        parked=backlog.parked,
        delayed=backlog.delayed,
        oldest_waiting_s=backlog.oldest_waiting_s,
        arrivals_per_s=_rounded(rates.arrivals_per_s),
        completions_per_s=_rounded(rates.completions_per_s),
        running=len(view.running),
        target=view.target if view.has_target else None,
        limits=_limits(view),
        policy=config.autoscaling.policy if config.autoscaling else "fixed",
        max_ongoing_requests=config.max_ongoing_requests,
        max_attempts=config.max_attempts,
        dead_letters=dead_letters,
        replicas=[_replica(record, view.version) for record in view.replicas],
    )


def _replica(record: ReplicaRecord, version: str) -> Replica:
    return Replica(record.replica, record.node, record.pid, record.state, record.started_ms, record.version == version)


def _limits(view: DeploymentView) -> Limits:
    override, scaling = view.override or {}, view.config.autoscaling
    if "num_replicas" in override:
        return Limits(override["num_replicas"], override["num_replicas"], "operator")
    if scaling is None:
        return Limits(view.config.num_replicas, view.config.num_replicas, "config")
    return Limits(
        override.get("min_replicas", scaling.min_replicas),
        override.get("max_replicas", scaling.max_replicas),
        "operator" if override else "config",
    )


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 2)


def _totals(deployments: list[Deployment]) -> Totals:
    return Totals(
        waiting=sum(d.waiting for d in deployments),
        in_flight=sum(d.in_flight for d in deployments),
        parked=sum(d.parked for d in deployments),
        delayed=sum(d.delayed for d in deployments),
        dead_letters=sum(d.dead_letters for d in deployments),
        arrivals_per_s=_sum_of_known([d.arrivals_per_s for d in deployments]),
        completions_per_s=_sum_of_known([d.completions_per_s for d in deployments]),
    )


def _sum_of_known(rates: list[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return round(sum(known), 2) if known else None


def _server_problems(server: Server) -> list[Problem]:
    found = []
    if server.eviction_policy != "noeviction":
        found.append(
            Problem(
                "error",
                f"maxmemory-policy is {server.eviction_policy}: a full server throws requests away without a trace; "
                "set it to noeviction",
            )
        )
    if server.maxmemory_bytes and server.used_memory_bytes >= NEARLY_FULL * server.maxmemory_bytes:
        share = server.used_memory_bytes / server.maxmemory_bytes
        found.append(
            Problem(
                "error",
                f"{share:.0%} of maxmemory is used: a full server refuses new requests; "
                "let the backlog shrink or raise maxmemory",
            )
        )
    if server.role not in ("master", "?"):
        found.append(Problem("error", f"this server is a {server.role}: it takes no writes; point url at the primary"))
    if not server.is_aof_on:
        found.append(
            Problem(
                "warning",
                "the append-only file is off: what is queued is lost when the server ends; set appendonly yes",
            )
        )
    return found


def _control_problems(nodes: list[Node], leader: Leader | None, is_needed: bool) -> list[Problem]:
    """Who runs and who decides. While nothing is deployed their absence harms nobody."""
    missing: Literal["error", "warning"] = "error" if is_needed else "warning"
    found = [
        Problem("warning", f"node {node.node} ({node.host}) no longer renews its lease")
        for node in nodes
        if not node.is_alive
    ]
    if not any(node.is_alive for node in nodes):
        found.append(Problem(missing, "no launcher lives, so nothing runs replicas; start `millstream launcher`"))
    if leader is None:
        found.append(
            Problem(missing, "no autoscaler leads, so targets stay as they are; start `millstream autoscaler`")
        )
    return found


def _deployment_problems(deployments: list[Deployment]) -> list[Problem]:
    found = []
    for d in deployments:
        if d.failure:
            found.append(Problem("error", f"{d.tag} cannot start: {d.failure}"))
        elif d.running and d.oldest_waiting_s is not None and d.oldest_waiting_s >= LATE_S:
            found.append(Problem("warning", f"{d.tag}: a request has been waiting for {d.oldest_waiting_s:.0f} s"))
    return found
