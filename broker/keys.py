"""Every key and channel millstream uses: its type, what it holds, who writes it and when it ends.

All keys of one deployment carry the same hash tag, `{<namespace>:<app>.<deployment>}`, so every script touches a
single slot and Redis Cluster works. No other file spells a key.
"""

import random
import re
from dataclasses import dataclass
from functools import cached_property

LANES = ("returned", "high", "normal", "low")  # the order in which a replica takes from them
GROUP = "replicas"  # the consumer group on every lane
PUT_TAGS = 64  # values stored by `put` are spread over this many hash tags

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def check_name(kind: str, name: str) -> str:
    """Return `name` if it can be part of a key (letters, digits, `_`, `-`); raise ValueError otherwise."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{kind} name {name!r} must consist of letters, digits, '_' and '-'")
    return name


def deployment_tag(app: str, deployment: str) -> str:
    """The tag of a deployment: the part of its ref ids before `~`, and of its hash tag after the namespace."""
    return f"{app}.{deployment}"


def put_tag() -> str:
    """A random one of the tags under which `put` stores values."""
    return f"put.{random.randrange(PUT_TAGS):02d}"


def split_ref(ref_id: str) -> tuple[str, str]:
    """`<tag>~<22 characters>` -> (tag, the 22 characters). Raises ValueError for anything else."""
    tag, tilde, local = ref_id.partition("~")
    if not tilde or "." not in tag or len(local) != 22:
        raise ValueError(f"{ref_id!r} is not a ref id; one looks like 'app.deployment~' and 22 characters")
    return tag, local


@dataclass(frozen=True)
class Keys:
    """Keys of the whole installation. Only the two of the leader share a slot."""

    namespace: str

    @cached_property
    def apps(self) -> str:
        """hash: application -> signed JSON (version, ingress, deployments, those leaving, when). Written by deploy, removed by delete."""
        return f"{self.namespace}:apps"

    @cached_property
    def nodes(self) -> str:
        """hash: node -> signed JSON (host, pid, started). Written by launchers; a node without lease is swept."""
        return f"{self.namespace}:nodes"

    def node_lease(self, node: str) -> str:
        """string with TTL: the launcher of this node lives. Renewed by the launcher."""
        return f"{self.namespace}:node:{node}:lease"

    def node_plan(self, node: str) -> str:
        """hash: deployment tag -> signed JSON (replicas, version, revision). Written by the autoscaler's placement, read by the launcher."""
        return f"{self.namespace}:node:{node}:plan"

    def node_wake(self, node: str) -> str:
        """channel: "the plan changed", a hint for the launcher, which re-reads it every second anyway."""
        return f"{self.namespace}:node:{node}:wake"

    @cached_property
    def leader(self) -> str:
        """string with TTL: "<autoscaler> <fence>", the autoscaler that decides. Renewed by it."""
        return f"{{{self.namespace}:leader}}:lease"

    @cached_property
    def fence(self) -> str:
        """string: a counter, raised at each change of leader. Permanent."""
        return f"{{{self.namespace}:leader}}:fence"

    @cached_property
    def changes(self) -> str:
        """stream, bounded: one entry whenever an application or a target changes. Wakes the autoscaler. Permanent."""
        return f"{self.namespace}:changes"

    @cached_property
    def secret_check(self) -> str:
        """string: a signed constant. Whoever connects verifies it, so that two secrets are noticed at once. Permanent."""
        return f"{self.namespace}:secret-check"

    def deployment(self, tag: str) -> "DeploymentKeys":
        return DeploymentKeys(self.namespace, tag)


@dataclass(frozen=True)
class DeploymentKeys:
    """Keys of one deployment (or of one `put` tag, of which only `result` is used)."""

    namespace: str
    tag: str

    @cached_property
    def prefix(self) -> str:
        return f"{{{self.namespace}:{self.tag}}}:"

    def lane(self, name: str) -> str:
        """stream: requests of one priority, or `returned` ones. One entry per attempt; deleted by what ends the attempt."""
        return f"{self.prefix}{name}"

    @cached_property
    def lanes(self) -> tuple[str, ...]:
        return tuple(self.lane(name) for name in LANES)

    @cached_property
    def open(self) -> str:
        """hash: ref -> "<lane> <entry id>", or "parked" / "delayed". Present means pending. Removed at the request's end."""
        return f"{self.prefix}open"

    @cached_property
    def held(self) -> str:
        """hash: ref of a parked or delayed request -> the request, packed (lua/held.lua). Removed when it leaves."""
        return f"{self.prefix}held"

    def supplied(self, ref: str) -> str:
        """hash: the values that a parked request has got so far, where it waits for several. Removed when it leaves."""
        return f"{self.supplied_prefix}{ref}"

    @cached_property
    def supplied_prefix(self) -> str:
        return f"{self.prefix}supplied:"

    @cached_property
    def parked(self) -> str:
        """sorted set: ref of a parked request -> server ms at which a sweeper looks after it again."""
        return f"{self.prefix}parked"

    @cached_property
    def due(self) -> str:
        """sorted set: ref of a delayed request -> server ms at which it is due. Promoted by any sweeper."""
        return f"{self.prefix}due"

    @cached_property
    def notes(self) -> str:
        """hash: "<ref>:readers" -> reply clients, "<ref>:waiters" -> ref ids, of open requests. Removed at their end."""
        return f"{self.prefix}notes"

    @cached_property
    def deadlines(self) -> str:
        """sorted set: ref of an open request with a deadline -> server ms at which it times out. Removed at its end."""
        return f"{self.prefix}deadlines"

    @cached_property
    def holds(self) -> str:
        """hash: ref of an open request -> when renewed, and the keys of the large values it will read. Removed at its end."""
        return f"{self.prefix}holds"

    def payload(self, ref: str) -> str:
        """list: the signed arguments of a request, where they are large, in pieces. With TTL until submit has seen it;
        removed at the request's end (of a dead letter: kept as long as that may be looked at)."""
        return f"{self.payload_prefix}{ref}"

    @cached_property
    def payload_prefix(self) -> str:
        return f"{self.prefix}payload:"

    def value(self, ref: str, part: str) -> str:
        """list with TTL: a large value, in pieces. `part` is the entry id of the attempt that made it, after "<n>." where
        it is item n of a stream, or "-" of one stored by `put`."""
        return f"{self.value_prefix}{ref}:{part}"

    def arriving(self, name: str) -> str:
        """list with TTL: what has come of a large value or payload. Renamed when all of it is there; `name` is random."""
        return f"{self.prefix}arriving:{name}"

    @cached_property
    def value_prefix(self) -> str:
        return f"{self.prefix}value:"

    def items(self, ref: str) -> str:
        """stream with TTL: what a streaming request has produced and its reader not read yet. Item n (from 0) is entry
        <n + 1>-1."""
        return f"{self.prefix}items:{ref}"

    def result(self, ref: str) -> str:
        """string with TTL: "<state> <lane> <entry id>", a newline, then the signed value or error, or plain text."""
        return f"{self.result_prefix}{ref}"

    @cached_property
    def result_prefix(self) -> str:
        return f"{self.prefix}result:"

    @cached_property
    def dead(self) -> str:
        """stream, bounded: requests whose attempts are used up, with their body and history. Ends with the deployment."""
        return f"{self.prefix}dead"

    @cached_property
    def config(self) -> str:
        """hash: what scripts and components must know (version, revision, config as signed JSON, ...). Ends with the deployment."""
        return f"{self.prefix}config"

    @cached_property
    def definition(self) -> str:
        """string: the signed, pickled callable with its constructor arguments. Ends with the deployment."""
        return f"{self.prefix}definition"

    @cached_property
    def status(self) -> str:
        """hash: state, message, traceback, what was refused, last death, target and reason, override. Ends with the deployment."""
        return f"{self.prefix}status"

    @cached_property
    def scaling(self) -> str:
        """stream, bounded: every scaling decision with its inputs and reason. Ends with the deployment."""
        return f"{self.prefix}scaling"

    @cached_property
    def replicas(self) -> str:
        """hash: replica -> signed JSON (node, pid, state, version, revision, connections). Removed by the script that buries the replica."""
        return f"{self.prefix}replicas"

    def lease(self, replica: str) -> str:
        """string with TTL: this replica lives. Renewed by its launcher."""
        return f"{self.lease_prefix}{replica}"

    @cached_property
    def lease_prefix(self) -> str:
        return f"{self.prefix}lease:"

    def reply(self, client: str) -> str:
        """sharded channel: results and matched notices for one client process (`client` is its random name)."""
        return f"{self.reply_prefix}{client}"

    @cached_property
    def reply_prefix(self) -> str:
        return f"{self.prefix}reply:"

    def orders(self, replica: str) -> str:
        """sharded channel: what one replica is told about the requests it runs: cancelled, or read so far."""
        return f"{self.orders_prefix}{replica}"

    @cached_property
    def orders_prefix(self) -> str:
        return f"{self.prefix}orders:"

    @cached_property
    def of_submit(self) -> tuple[str, ...]:
        """What `submit.lua` names, in its order."""
        return (
            self.config, self.open, self.result_prefix, self.prefix, self.notes, self.deadlines, self.payload_prefix,
        )  # fmt: skip

    @cached_property
    def of_finish(self) -> dict[str, tuple[str, ...]]:
        """What `finish.lua` names, in its order, by lane."""
        return {
            lane: (
                self.lane(lane), self.open, self.notes, self.result_prefix, self.reply_prefix,
                self.deadlines, self.holds, self.payload_prefix, self.value_prefix,
            )
            for lane in LANES
        }  # fmt: skip

    @cached_property
    def owned(self) -> tuple[str, ...]:
        """The keys that `delete` removes with the deployment (results stay until their TTL)."""
        return (
            *self.lanes, self.open, self.held, self.parked, self.due, self.notes, self.deadlines, self.holds, self.dead,
            self.config, self.definition, self.status, self.scaling, self.replicas,
        )  # fmt: skip
