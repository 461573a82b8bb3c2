"""Reads and writes what the control plane goes by: applications, targets, failures, nodes; and one snapshot of it all."""

import json
import logging
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any

import redis.exceptions

from millstream.broker import control_scripts
from millstream.broker.codec import codec_for
from millstream.broker.complaints import Complaints
from millstream.broker.connection import Control, answers_of, explained, ping, run, run_all, send_all
from millstream.broker.keys import DeploymentKeys, Keys, deployment_tag
from millstream.broker.link import REFUSED, foreign
from millstream.broker.records import (
    NOT_OURS,
    AppRecord,
    Current,
    DeploymentView,
    NewDeployment,
    NodeRecord,
    Planned,
    R,
    ReplicaRecord,
    read_config,
    read_json_object,
)
from millstream.broker.removal import Removal
from millstream.broker.signed import UNREADABLE, Signer
from millstream.config import DeploymentConfig, Settings
from millstream.errors import SignatureError

CHANGES_KEPT = 1000
NODE_KEPT_S = 60.0  # without a lease: its launcher may be about to come back, after an outage of the server as well
log = logging.getLogger("millstream.registry")
VIEWS_AT_ONCE = 50  # deployments that are read together: 3 ms of the server
REMEMBERED = 5000  # records that are not verified and parsed again while they stay the same; some are read every second


class Registry:
    """Reads and writes the control plane's records over one redis-py client."""

    def __init__(self, client: Control, settings: Settings) -> None:
        self.client: Any = client  # redis-py's reply types change from release to release; we decode what we read
        self.settings = settings
        self.keys = Keys(settings.namespace)
        self.signer = Signer(settings)
        self._removal = Removal(client, settings)
        self._absent_since: dict[str, float] = {}  # nodes without a lease, by our own clock
        self._complaints = Complaints(log)
        self._current = lru_cache(REMEMBERED)(self._read_current)
        self._read_again = lru_cache(REMEMBERED)(self.signer.read)
        self.unreadable: set[str] = set()  # applications and tags of deployments whose records others have written

    def keys_of(self, tag: str) -> DeploymentKeys:
        return self.keys.deployment(tag)

    async def check_secret(self, *, only_look: bool = False) -> None:
        """Leave or verify the signed mark that shows two processes whether they use the same secret. SignatureError."""
        codec = codec_for(self.settings.secret_key, self.settings.namespace, "secret.check")
        mark = codec.seal("check", b"secret-check", b"")
        stored = await self.client.get(
            self.keys.secret_check
        )  # first: a full server refuses even a SET that sets nothing
        if stored is None and not only_look:
            with explained():
                is_first = await self.client.set(self.keys.secret_check, mark, nx=True)
            stored = mark if is_first else await self.client.get(self.keys.secret_check)
        if stored is not None and stored != mark:
            raise SignatureError(
                f"namespace {self.settings.namespace!r} on this server is used with another secret; "
                "set MILLSTREAM_SECRET_KEY to the one it was set up with, or choose another namespace"
            )

    # applications

    async def deploy(self, app: str, ingress: str, deployments: Iterable[NewDeployment]) -> AppRecord:
        """Store an application, replacing the one of that name. Its requests stay.

        Replicas stay where the code is the same, and take the new config over; the others are replaced. Deployments
        that are no longer part of it serve on until nobody of the former version can call them.
        """
        new, revision, now_ms = list(deployments), secrets.token_hex(4), await self.now_ms()
        for deployment in new:
            await self._store(deployment_tag(app, deployment.name), revision, deployment)
        while True:
            text = await self.client.hget(self.keys.apps, app) or b""
            before = self._read(AppRecord, f"application {app!r}", text, app) if text else None
            leaving = await self._leaving(before, {d.name for d in new}) if before else {}
            record = AppRecord(app, revision, ingress, [d.name for d in new], now_ms, leaving)
            if await self._replace(text, record):
                break
        await self.announce(f"deployed {app}")
        await self.retire()
        return record

    async def _leaving(self, before: AppRecord, staying: set[str]) -> dict[str, str]:
        leaving = {name: revision for name, revision in before.leaving.items() if name not in staying}
        for name in set(before.deployments) - staying:
            revision = await self.client.hget(self.keys_of(deployment_tag(before.name, name)).config, "revision")
            leaving[name] = (revision or b"").decode()
        return leaving

    async def _replace(self, read: bytes, record: AppRecord) -> bool:
        call = control_scripts.replace(self.keys, record.name, read, self.signer.write(record, record.name))
        done = await run(self.client, call)
        return done == 1

    async def _store(self, tag: str, revision: str, new: NewDeployment) -> None:
        keys, config = self.keys_of(tag), new.config
        await run(self.client, control_scripts.groups(keys))
        current = await self.current(tag)
        present = "" if current is None else current.version  # what cannot be read does not stay
        call = control_scripts.deploy(
            keys, revision, new.code, self._signed(config, tag, revision, revision), new.definition, _limits(config),
            configured=config.user_config is not None, staying=(present, self._signed(config, tag, revision, present)),
        )  # fmt: skip
        await run(self.client, call)

    def _signed(self, config: DeploymentConfig, tag: str, revision: str, version: str) -> str:
        """A config as it is stored beside its revision and version, which the scripts read as well and cannot verify."""
        return self.signer.sign("config", config.to_json(), tag, revision, version)

    def _read_current(self, tag: str, version: bytes, revision: bytes, config: bytes) -> Current:
        """What the fields of a config say. SignatureError, or ValueError, if they do not belong together."""
        names = version.decode(), revision.decode()
        return Current(*names, read_config(self.signer.verified("config", config, tag, names[1], names[0])))

    async def retire(self) -> None:
        """One pass over the deployments that have left their applications: those that nobody needs go. Waits for nothing."""
        for record in (await self.apps()).values():
            if not record.leaving or await self._has_former_replicas(record):
                continue
            for name, revision in record.leaving.items():
                keys = self.keys_of(deployment_tag(record.name, name))
                was_open = await self.client.exists(keys.config)
                if await self._removal.close(keys, revision) and was_open:
                    await self.announce(f"removed {keys.tag}")
                if await self._removal.step(keys):
                    await self._forget(record.name, name, revision)

    async def _has_former_replicas(self, record: AppRecord) -> bool:
        """Are there replicas of an earlier version, which may call what has left?"""
        for tag in record.tags:
            keys = self.keys_of(tag)
            current = await self.current(tag)
            replicas = self._replicas(tag, await self.client.hgetall(keys.replicas))
            if any(current is None or replica.version != current.version for replica in replicas):
                return True
        return False

    async def _forget(self, app: str, name: str, revision: str) -> None:
        while text := await self.client.hget(self.keys.apps, app):
            record = self._read(AppRecord, f"application {app!r}", text, app)
            if record is None or record.leaving.get(name) != revision:
                return
            del record.leaving[name]
            if await self._replace(text, record):
                return

    async def delete(self, app: str) -> bool:
        """Remove an application: nothing more is accepted, its replicas drain, then what is queued goes. False if there was none."""
        record = (await self.apps()).get(app)
        if record is None:
            return False
        await self.client.hdel(self.keys.apps, app)
        all_keys = [self.keys_of(tag) for tag in record.all_tags]
        for keys in all_keys:
            await self.client.delete(keys.config, keys.definition)
        await self.announce(f"removed {', '.join(keys.tag for keys in all_keys)}")
        await self._removal.finish(all_keys)
        return True

    async def apps(self) -> dict[str, AppRecord]:
        """All applications; without those whose records cannot be read, which are in `unreadable` then."""
        stored, found = await self.client.hgetall(self.keys.apps), dict[str, AppRecord]()
        for field, text in sorted(stored.items()):
            name = field.decode(errors="replace")
            record = self._read(AppRecord, f"application {name!r}", text, name)
            if record is not None:
                found[name] = record
                self.unreadable.discard(name)
            else:
                self.unreadable.add(name)
        return found

    async def definition(self, tag: str) -> bytes | None:
        stored: bytes | None = await self.client.get(self.keys_of(tag).definition)
        return stored

    async def current(self, tag: str) -> Current | None:
        """What is in force for a deployment; None if it is not deployed, or cannot be read."""
        fields = await self.client.hmget(self.keys_of(tag).config, "version", "revision", "config")
        if fields[2] is None:
            return None
        try:
            current = self._current(tag, *(field or b"" for field in fields))
        except UNREADABLE as e:
            self._complaints.about(f"the config of {tag}", e)
            return None
        self._complaints.well(f"the config of {tag}")
        return current

    async def of_version(self, app: str, version: str) -> dict[str, DeploymentConfig]:
        """The deployments of an application whose code is of this version: they can share a process that imports it."""
        record, found = (await self.apps()).get(app), {}
        for tag in record.all_tags if record is not None else ():
            current = await self.current(tag)
            if current is not None and current.version == version:
                found[tag] = current.config
        return found

    async def announce(self, what: str) -> None:
        """Wake the autoscaler: something that it goes by has changed. A hint: it looks once a second anyway."""
        with suppress(redis.exceptions.OutOfMemoryError):
            await self.client.xadd(self.keys.changes, {"what": what}, maxlen=CHANGES_KEPT, approximate=True)

    # targets and failures

    async def override(self, tag: str, override: dict[str, Any] | None) -> None:
        """An operator's word on the number of replicas: {"num_replicas": n} or {"min_replicas", "max_replicas"}; None ends it."""
        keys = self.keys_of(tag)
        if override is None:
            await self.client.hdel(keys.status, "override")
        else:
            signed = self.signer.sign("override", json.dumps(override), tag)
            await run(self.client, control_scripts.note(keys, "", {"override": signed}))
        await self.announce(f"override of {tag}")

    async def fail(self, tag: str, revision: str, message: str, traceback: str) -> None:
        """Record that a deployment cannot start as it was deployed with this revision."""
        fields = {"state": "DEPLOY_FAILED", "message": message, "traceback": traceback, "failed_revision": revision}
        await run(self.client, control_scripts.note(self.keys_of(tag), revision, fields))

    async def withdraw(
        self, tag: str, revision: str, back_to: Current, message: str, traceback: str
    ) -> control_scripts.Withdrawn:
        """Take a config back that a running replica could not take over; the one it works by is in force again.

        Whoever waits for the deploy learns of it. Replicas that have taken it over already are told to go back.
        """
        config = self._signed(back_to.config, tag, back_to.revision, back_to.version)
        call = control_scripts.withdraw(
            self.keys_of(tag), revision, back_to.revision, config, message, traceback, _limits(back_to.config)
        )
        answer = await run(self.client, call)
        if answer is control_scripts.Withdrawn.WITHDRAWN:
            await self.announce(f"withdrew revision {revision} of {tag}")
        return answer

    async def note_death(self, tag: str, replica: str, cause: str) -> None:
        """Keep the cause of a replica's end for whoever asks, until the next deploy."""
        death = json.dumps({"replica": replica, "cause": cause, "at_ms": await self.now_ms()})
        await run(self.client, control_scripts.note(self.keys_of(tag), "", {"last_death": death}))

    # nodes

    async def nodes(self) -> dict[str, NodeRecord]:
        """Nodes whose launcher lives. Those that were gone for a minute of looking are forgotten."""
        records = await self.known_nodes()
        alive = {name: record for name, record in records.items() if await self._lives(name)}
        await self._forget_nodes(records.keys() - alive.keys())
        return alive

    async def known_nodes(self) -> dict[str, NodeRecord]:
        """All nodes on record, also those without a lease. Removes none."""
        found = {}
        for field, text in sorted((await self.client.hgetall(self.keys.nodes)).items()):
            name = field.decode(errors="replace")
            if (node := self._read(NodeRecord, f"node {name!r}", text, name)) is not None:
                found[name] = node
        return found

    async def _lives(self, node: str) -> bool:
        return bool(await self.client.exists(self.keys.node_lease(node)))

    async def _forget_nodes(self, absent: set[str]) -> None:
        """Not at the first look: after an outage no node has its lease, and a launcher whose plan is gone drains all it runs."""
        now_s = time.monotonic()
        self._absent_since = {name: self._absent_since.get(name, now_s) for name in absent}
        for name, since_s in self._absent_since.items():
            if now_s - since_s > NODE_KEPT_S:
                await self.client.hdel(self.keys.nodes, name)
                await self.client.delete(self.keys.node_plan(name))

    async def plan(self, node: str, before: Mapping[str, Planned] | None = None) -> dict[str, Planned]:
        """What a node should run, by tag. What was planned `before` stands in for what cannot be read."""
        plan = {}
        for field, text in (await self.client.hgetall(self.keys.node_plan(node))).items():
            tag = field.decode(errors="replace")
            planned = self._read(Planned, f"the plan of node {node!r} for {tag!r}", text, node, tag)
            if (planned := planned or (before or {}).get(tag)) is not None:
                plan[tag] = planned
        return plan

    async def assign(self, node: str, planned: Mapping[str, Planned]) -> None:
        """Tell a node how many replicas of these deployments to run, of which version and by which config."""
        plan = self.keys.node_plan(node)
        texts = [(tag, self.signer.write(one, node, tag)) for tag, one in planned.items()]
        for refused in await run_all(self.client, [control_scripts.enlist(plan, *text) for text in texts]):
            if isinstance(refused, Exception):
                raise refused
        if not await self.client.hexists(self.keys.nodes, node):  # it has left meanwhile: nobody else would delete that
            await self.client.delete(plan)
            return
        await self.client.publish(self.keys.node_wake(node), "plan")

    async def unassign(self, node: str, tag: str) -> None:
        await self.client.hdel(self.keys.node_plan(node), tag)
        await self.client.publish(self.keys.node_wake(node), "plan")

    # reading it all

    async def view(self, app: str, name: str) -> DeploymentView | None:
        """One deployment as it is now; None if it is not deployed. SignatureError where some other program wrote its records."""
        (found,) = await self._looks([(app, name)])
        if isinstance(found, Exception):
            raise found
        return found

    async def _looks(self, deployments: Sequence[tuple[str, str]]) -> list[DeploymentView | Exception | None]:
        """As `view`, of each, in one round trip. What it cannot read is in its place, as one of REFUSED."""
        all_keys = [self.keys_of(deployment_tag(*each)) for each in deployments]
        hashes = [("HGETALL", key) for keys in all_keys for key in (keys.config, keys.status, keys.replicas)]
        calls = [control_scripts.backlog(keys) for keys in all_keys]
        replies = await send_all(self.client, [*hashes, *[call.command() for call in calls]])
        backlogs = await answers_of(self.client, calls, replies[len(hashes) :])
        found: list[DeploymentView | Exception | None] = []
        for number, (app, name) in enumerate(deployments):
            try:
                found.append(self._look(app, name, [*replies[3 * number : 3 * number + 3], backlogs[number]]))
            except REFUSED as e:
                found.append(e)
        return found

    def _look(self, app: str, name: str, replies: list[Any]) -> DeploymentView | None:
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        config, status, replicas, backlog = replies
        if not config:
            return None
        try:
            return self._view(app, name, config, status, replicas, backlog)
        except NOT_OURS as e:
            raise foreign(f"the config or status of {deployment_tag(app, name)}: {e!r:.200}") from None

    def _view(
        self, app: str, name: str, config: dict[bytes, bytes], stored: dict[bytes, bytes], replicas: dict[bytes, bytes],
        backlog: control_scripts.Backlog,
    ) -> DeploymentView:  # fmt: skip
        status = {field.decode(): value.decode() for field, value in stored.items()}
        override = status.get("override")
        tag = deployment_tag(app, name)
        version, revision, found = self._current(
            tag, config[b"version"], config.get(b"revision", b""), config[b"config"]
        )
        failed = status.get("state") == "DEPLOY_FAILED" and status.get("failed_revision") == revision
        last_death = status.get("last_death")
        return DeploymentView(
            app=app,
            name=name,
            version=version,
            config=found,
            has_target="target" in status,
            target=int(status.get("target", 0)),
            reason=status.get("reason", ""),
            failure=status.get("message", "") if failed else "",
            traceback=status.get("traceback", "") if failed else "",
            override=read_json_object(self.signer.verified("override", override.encode(), tag)) if override else None,
            replicas=self._replicas(tag, replicas),
            backlog=backlog,
            revision=revision,
            refused=status.get("refused_revision", ""),
            refusal=status.get("refused_message", ""),
            refusal_traceback=status.get("refused_traceback", ""),
            last_death=read_json_object(last_death) if last_death else None,
        )

    async def views(
        self, *, with_leaving: bool = False, records: Mapping[str, AppRecord] | None = None
    ) -> list[DeploymentView]:
        """Every deployment of every application; also those that have left one, if wanted. What some other program has
        written over is left out, said once, and `unreadable` then. `records`: what `apps` has just answered."""
        if records is None:
            records = await self.apps()
        order = [
            (record.name, name)
            for record in records.values()
            for name in [*record.deployments, *(record.leaving if with_leaving else ())]
        ]
        views = []
        for first in range(0, len(order), VIEWS_AT_ONCE):
            some = order[first : first + VIEWS_AT_ONCE]
            for each, found in zip(some, await self._looks(some), strict=True):
                tag = deployment_tag(*each)
                if isinstance(found, Exception):
                    self.unreadable.add(tag)
                    self._complaints.about(f"deployment {tag}", found)
                    continue
                self.unreadable.discard(tag)
                self._complaints.well(f"deployment {tag}")
                if found is not None:
                    views.append(found)
        return views

    async def without_the_dead(self, view: DeploymentView) -> DeploymentView:
        """The same without replicas that have no lease any more: it may take seconds until they are buried."""
        keys = self.keys_of(view.tag)
        alive = [r for r in view.replicas if await self.client.exists(keys.lease(r.replica))]
        return replace(view, replicas=alive)

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

    async def dead_dropped(self, tag: str) -> int:
        """Dead letters that were too old or too many to be kept."""
        return int(await self.client.hget(self.keys_of(tag).status, "dead_dropped") or 0)

    def _replicas(self, tag: str, stored: dict[bytes, bytes]) -> list[ReplicaRecord]:
        """Those on record, by name; without what cannot be read."""
        found = []
        for field, text in sorted(stored.items()):
            name = field.decode(errors="replace")
            if (record := self._read(ReplicaRecord, f"replica {name!r} of {tag}", text, tag, name)) is not None:
                found.append(record)
        return found

    def _read(self, cls: type[R], what: str, text: bytes, *place: str) -> R | None:
        """A signed record; None if some other program wrote it, or put it there, which is said once."""
        try:
            # A plan is the same most of the time, cannot be changed, and has a record per deployment.
            read = self._read_again if cls is Planned else self.signer.read
            record = read(cls, text, *place)  # type: ignore[arg-type] # mypy: a class is hashable
        except UNREADABLE as e:
            self._complaints.about(what, e)
            return None
        self._complaints.well(what)
        return record

    async def now_ms(self) -> int:
        """The server's clock."""
        seconds, micros = await self.client.time()
        return int(seconds) * 1000 + int(micros) // 1000


def _limits(config: DeploymentConfig) -> tuple[str, ...]:
    """What the scripts must know of a config, as `limits.lua` takes it."""
    timeout_s = config.request_timeout_s
    return (
        str(config.max_attempts),
        str(int(config.result_ttl_s)),
        "" if config.max_queued_requests is None else str(config.max_queued_requests),
        "" if timeout_s is None else str(int(timeout_s * 1000)),
    )


async def connect_registry(client: Control, settings: Settings, *, only_look: bool = False) -> Registry:
    """A registry whose server answers and whose secret is the right one. BrokerUnavailableError, SignatureError.

    With `only_look`, a namespace that nobody has used yet is not marked with this secret.
    """
    await ping(client, settings)
    registry = Registry(client, settings)
    await registry.check_secret(only_look=only_look)
    return registry
