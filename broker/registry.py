"""What is deployed, on which nodes, by which replicas: the control plane's records, and one snapshot of it all."""

import json
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import anyio

from millstream.broker import scripts
from millstream.broker.codec import codec_for
from millstream.broker.connection import Control, ping, run
from millstream.broker.keys import DeploymentKeys, Keys, deployment_tag
from millstream.broker.outcomes import ENDED_TTL_S
from millstream.broker.supplying import Supplier
from millstream.config import DeploymentConfig, Settings
from millstream.errors import SignatureError

CHANGES_KEPT = 1000
VIEWS_AT_ONCE = 8  # redis-py opens a connection for each: not one per deployment
REMOVE_WITHIN_S = 25.0  # longer than graceful_shutdown_timeout_s by default


@dataclass(frozen=True, slots=True)
class AppRecord:
    """One application: the version that is deployed, its ingress, its deployments."""

    name: str
    version: str
    ingress: str
    deployments: list[str]
    deployed_ms: int = 0

    @property
    def tags(self) -> list[str]:
        return [deployment_tag(self.name, deployment) for deployment in self.deployments]


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
    backlog: scripts.Backlog

    @property
    def tag(self) -> str:
        return deployment_tag(self.app, self.name)

    @property
    def running(self) -> list[ReplicaRecord]:
        return [r for r in self.replicas if r.state == "RUNNING" and r.version == self.version]

    @property
    def status(self) -> str:
        """Ray Serve's word for the state: UPDATING, HEALTHY, DEPLOY_FAILED, UPSCALING or DOWNSCALING."""
        if self.failure:
            return "DEPLOY_FAILED"
        if not self.has_target:
            return "UPDATING"
        running, others = len(self.running), len(self.replicas) - len(self.running)
        if running == self.target and not others:
            return "HEALTHY"
        if any(r.version != self.version for r in self.replicas) or (running == 0 and self.target > 0):
            return "UPDATING"
        return "UPSCALING" if running < self.target else "DOWNSCALING"


class Registry:
    """Reads and writes the control plane's records over one redis-py client."""

    def __init__(self, client: Control, settings: Settings) -> None:
        self.client: Any = client  # redis-py's reply types change from release to release; we decode what we read
        self.settings = settings
        self.keys = Keys(settings.namespace)

    def keys_of(self, tag: str) -> DeploymentKeys:
        return self.keys.deployment(tag)

    async def check_secret(self, *, only_look: bool = False) -> None:
        """Leave or verify the signed mark that shows two processes whether they use the same secret. SignatureError."""
        codec = codec_for(self.settings.secret_key, self.settings.namespace, "secret.check")
        mark = codec.seal("check", b"secret-check", b"")
        if only_look or not await self.client.set(self.keys.secret_check, mark, nx=True):
            stored = await self.client.get(self.keys.secret_check)
            if stored is not None and stored != mark:
                raise SignatureError(
                    f"namespace {self.settings.namespace!r} on this server is used with another secret; "
                    "set MILLSTREAM_SECRET_KEY to the one it was set up with, or choose another namespace"
                )

    # applications

    async def deploy(self, app: str, ingress: str, deployments: Iterable[NewDeployment]) -> AppRecord:
        """Store an application, replacing the one of that name: its requests stay, its replicas are replaced."""
        new, before = list(deployments), (await self.apps()).get(app)
        record = AppRecord(app, secrets.token_hex(4), ingress, [d.name for d in new], await self.now_ms())
        for deployment in new:
            await self._store(deployment_tag(app, deployment.name), record, deployment)
        await self.client.hset(self.keys.apps, app, json.dumps(asdict(record)))
        await self.announce(f"deployed {app}")
        if gone := set(before.tags if before else ()) - set(record.tags):
            await self._remove(sorted(gone))
        return record

    async def _store(self, tag: str, record: AppRecord, deployment: NewDeployment) -> None:
        keys, config = self.keys_of(tag), deployment.config
        await run(self.client, scripts.groups(keys))
        async with self.client.pipeline(transaction=True) as pipe:
            pipe.set(keys.definition, deployment.definition)
            fields = {
                "version": record.version,
                "config": config.to_json(),
                "max_attempts": str(config.max_attempts),
                "result_ttl_s": str(int(config.result_ttl_s)),
            }
            if config.max_queued_requests is not None:
                fields["max_queued"] = str(config.max_queued_requests)
            if config.request_timeout_s is not None:
                fields["timeout_ms"] = str(int(config.request_timeout_s * 1000))
            pipe.hdel(keys.config, "max_queued", "timeout_ms")  # of the version before
            pipe.hset(keys.config, mapping=fields)
            pipe.hdel(keys.status, "state", "message", "traceback", "failed_version")
            if await self.client.hget(keys.status, "target") == b"0":
                pipe.hdel(keys.status, "target")  # decided anew: this version may want replicas from the start
            await pipe.execute()

    async def delete(self, app: str) -> bool:
        """Remove an application: nothing more is accepted, its replicas drain, then what is queued goes. False if there was none."""
        record = (await self.apps()).get(app)
        if record is None:
            return False
        await self.client.hdel(self.keys.apps, app)
        await self._remove(record.tags)
        return True

    async def _remove(self, tags: Iterable[str]) -> None:
        """Close the deployments to new requests, wait for their replicas to say goodbye, delete the rest."""
        all_keys = [self.keys_of(tag) for tag in tags]
        for keys in all_keys:
            await self.client.delete(keys.config, keys.definition)
        await self.announce(f"removed {', '.join(keys.tag for keys in all_keys)}")
        # All at once: a caller's replicas end when the requests that they wait for, in a callee's queue, are gone.
        async with anyio.create_task_group() as removals:
            for keys in all_keys:
                removals.start_soon(self._remove_when_drained, keys)

    async def _remove_when_drained(self, keys: DeploymentKeys) -> None:
        """Cancel what waits, let what runs finish, cancel what is left then. Nobody is left waiting for an answer."""
        await self._discard(keys, running=False)
        with anyio.move_on_after(REMOVE_WITHIN_S):
            while await self._has_living_replicas(keys) and not await self.client.exists(keys.config):  # noqa: ASYNC110
                await anyio.sleep(0.02)
        if await self.client.exists(keys.config):
            return  # deployed again meanwhile
        await self._discard(keys, running=True)
        await self.client.delete(*keys.owned)

    async def _discard(self, keys: DeploymentKeys, *, running: bool) -> None:
        supplier = Supplier(self.settings, lambda call: run(self.client, call))
        cursor, is_through = "0", False
        while not is_through:
            call = scripts.discard(keys, cursor, ENDED_TTL_S, f"deployment {keys.tag} was deleted", running=running)
            cursor, waiters = await run(self.client, call)
            is_through = cursor == "0"
            await supplier.supply_all(keys.tag, waiters)

    async def _has_living_replicas(self, keys: DeploymentKeys) -> bool:
        leases = [keys.lease(name.decode()) for name in await self.client.hkeys(keys.replicas)]
        return bool(leases) and await self.client.exists(*leases) > 0

    async def apps(self) -> dict[str, AppRecord]:
        records = await self.client.hgetall(self.keys.apps)
        return {name.decode(): AppRecord(**json.loads(text)) for name, text in sorted(records.items())}

    async def definition(self, tag: str) -> bytes | None:
        stored: bytes | None = await self.client.get(self.keys_of(tag).definition)
        return stored

    async def announce(self, what: str) -> None:
        """Wake the autoscaler: something that it goes by has changed."""
        await self.client.xadd(self.keys.changes, {"what": what}, maxlen=CHANGES_KEPT, approximate=True)

    # targets and failures

    async def override(self, tag: str, override: dict[str, Any] | None) -> None:
        """An operator's word on the number of replicas: {"num_replicas": n} or {"min_replicas", "max_replicas"}; None ends it."""
        keys = self.keys_of(tag)
        if override is None:
            await self.client.hdel(keys.status, "override")
        else:
            await self.client.hset(keys.status, "override", json.dumps(override))
        await self.announce(f"override of {tag}")

    async def fail(self, tag: str, version: str, message: str, traceback: str) -> None:
        """Record that this version of a deployment cannot start."""
        keys = self.keys_of(tag)
        if await self.client.hget(keys.config, "version") == version.encode():
            fields = {"state": "DEPLOY_FAILED", "message": message, "traceback": traceback, "failed_version": version}
            await self.client.hset(keys.status, mapping=fields)

    # nodes

    async def nodes(self) -> dict[str, NodeRecord]:
        """Nodes whose launcher lives."""
        records = {
            n.decode(): NodeRecord(**json.loads(text))
            for n, text in (await self.client.hgetall(self.keys.nodes)).items()
        }
        alive = {}
        for name, record in records.items():
            if await self.client.exists(self.keys.node_lease(name)):
                alive[name] = record
            elif record.started_ms + 60_000 < await self.now_ms():
                await self.client.hdel(self.keys.nodes, name)
                await self.client.delete(self.keys.node_plan(name))
        return alive

    async def plan(self, node: str) -> dict[str, tuple[int, str]]:
        """What a node should run: tag -> (replicas, version)."""
        rows = await self.client.hgetall(self.keys.node_plan(node))
        plans = {tag.decode(): json.loads(text) for tag, text in rows.items()}
        return {tag: (plan["replicas"], plan["version"]) for tag, plan in plans.items()}

    async def assign(self, node: str, tag: str, replicas: int, version: str) -> None:
        """Tell a node how many replicas of a deployment to run; 0 of a deployment that is gone removes the line."""
        text = json.dumps({"replicas": replicas, "version": version})
        await self.client.hset(self.keys.node_plan(node), tag, text)
        await self.client.publish(self.keys.node_wake(node), "plan")

    async def unassign(self, node: str, tag: str) -> None:
        await self.client.hdel(self.keys.node_plan(node), tag)
        await self.client.publish(self.keys.node_wake(node), "plan")

    # reading it all

    async def view(self, app: str, name: str) -> DeploymentView | None:
        """One deployment as it is now; None if it is not deployed."""
        keys = self.keys_of(deployment_tag(app, name))
        async with self.client.pipeline(transaction=False) as pipe:
            pipe.hgetall(keys.config)
            pipe.hgetall(keys.status)
            pipe.hvals(keys.replicas)
            config, status, replicas = await pipe.execute()
        if not config:
            return None
        backlog = await run(self.client, scripts.backlog(keys))
        status = {field.decode(): value.decode() for field, value in status.items()}
        override = status.get("override")
        version = config[b"version"].decode()
        failed = status.get("state") == "DEPLOY_FAILED" and status.get("failed_version") == version
        return DeploymentView(
            app=app,
            name=name,
            version=version,
            config=DeploymentConfig.from_json(config[b"config"]),
            has_target="target" in status,
            target=int(status.get("target", 0)),
            reason=status.get("reason", ""),
            failure=status.get("message", "") if failed else "",
            traceback=status.get("traceback", "") if failed else "",
            override=json.loads(override) if override else None,
            replicas=sorted((ReplicaRecord(**json.loads(text)) for text in replicas), key=lambda r: r.replica),
            backlog=backlog,
        )

    async def views(self) -> list[DeploymentView]:
        """Every deployment of every application. Raises what the first failed reading raised, not a group of them."""
        found: dict[tuple[str, str], DeploymentView | None] = {}
        limiter = anyio.CapacityLimiter(VIEWS_AT_ONCE)

        async def look(app: str, name: str) -> None:
            async with limiter:
                found[app, name] = await self.view(app, name)

        order = [(record.name, name) for record in (await self.apps()).values() for name in record.deployments]
        try:
            async with anyio.create_task_group() as tasks:
                for app, name in order:
                    tasks.start_soon(look, app, name)
        except ExceptionGroup as group:  # a caller that catches an outage must see it as one
            raise group.exceptions[0] from None
        return [view for pair in order if (view := found[pair]) is not None]

    async def decisions(self, tag: str, count: int = 20) -> list[dict[str, str]]:
        """The last scaling decisions, newest first; `at_ms` is the server's time of each."""
        rows = await self.client.xrevrange(self.keys_of(tag).scaling, count=count)
        return [
            {"at_ms": entry.decode().split("-")[0], **{k.decode(): v.decode() for k, v in fields.items()}}
            for entry, fields in rows
        ]

    async def dead_count(self, tag: str) -> int:
        count: int = await self.client.xlen(self.keys_of(tag).dead)
        return count

    async def now_ms(self) -> int:
        """The server's clock."""
        seconds, micros = await self.client.time()
        return int(seconds) * 1000 + int(micros) // 1000


async def connect_registry(client: Control, settings: Settings, *, only_look: bool = False) -> Registry:
    """A registry whose server answers and whose secret is the right one. BrokerUnavailableError, SignatureError.

    With `only_look`, a namespace that nobody has used yet is not marked with this secret.
    """
    await ping(client, settings)
    registry = Registry(client, settings)
    await registry.check_secret(only_look=only_look)
    return registry
