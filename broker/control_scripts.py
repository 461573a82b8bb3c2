"""The Lua scripts about deployments, replicas and those who look after them; as `scripts` has those that move requests."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from millstream.broker.call import Call, script
from millstream.broker.keys import LANES, DeploymentKeys, Keys
from millstream.broker.scripts import REPAIR_AFTER_MS, SWEEP_LIMIT

RENEW_HOLDS_AFTER_MS = 600_000


class Withdrawn(StrEnum):
    WITHDRAWN = "withdrawn"
    SUPERSEDED = "superseded"  # another config is in force by now
    SPENT = "spent"  # the one to go back to was withdrawn, too


class Removed(StrEnum):
    REMOVED = "removed"
    DEPLOYED = "deployed"  # anew: it stays
    OPEN = "open"  # there are requests without an end


@dataclass(frozen=True, slots=True)
class Swept:
    promoted: int
    stuck: list[tuple[bytes, list[str]]]  # parked ref, the ref ids it misses
    without_lease: list[str]
    overdue: list[bytes]  # refs past their deadline
    keep: list[str]  # keys of large values that open requests will read
    holds_cursor: bytes  # for the next sweep
    now_ms: int = field(default=0, compare=False)  # on the server's clock


@dataclass(frozen=True, slots=True)
class Backlog:
    """One exact reading of a deployment."""

    waiting: int = 0
    in_flight: int = 0
    parked: int = 0
    delayed: int = 0
    oldest_waiting_s: float | None = None
    arrivals: int = 0  # ever; a counter to take differences of
    due: int = 0  # delayed requests whose time has come
    last_ids: tuple[str, ...] = ("0-0",) * len(LANES)


def groups(keys: DeploymentKeys) -> Call[int]:
    """Makes the lanes' consumer groups where they are missing; answers how many."""
    return Call(script("groups"), keys.lanes, (), int)


def sweep(keys: DeploymentKeys, holds_cursor: bytes = b"0") -> Call[Swept]:
    return Call(
        script("sweep"),
        (
            *keys.lanes, keys.replicas, keys.due, keys.parked, keys.open,
            keys.held, keys.prefix, keys.lease_prefix, keys.deadlines, keys.holds, keys.supplied_prefix,
            keys.dead, keys.status,
        ),
        (SWEEP_LIMIT, REPAIR_AFTER_MS, RENEW_HOLDS_AFTER_MS, holds_cursor),
        lambda reply: Swept(
            reply[0],
            [(row[0], [ref_id.decode() for ref_id in row[1:]]) for row in reply[1]],
            [name.decode() for name in reply[2]],
            reply[3],
            [key.decode() for key in reply[4][1]],
            reply[4][0],
            int(reply[5]),
        ),
    )  # fmt: skip


def renew(leases: Sequence[str], ttl_s: float, who: str) -> Call[int]:
    """`leases` must share a slot: those of one deployment, or one node's."""
    return Call(script("renew"), leases, (int(ttl_s * 1000), who), int)


def backlog(keys: DeploymentKeys) -> Call[Backlog]:
    def read(reply: list[Any]) -> Backlog:
        waiting, in_flight, parked, delayed, age_ms, arrivals, due, last_ids = reply
        age_s = None if age_ms < 0 else age_ms / 1000
        return Backlog(waiting, in_flight, parked, delayed, age_s, arrivals, due, tuple(i.decode() for i in last_ids))

    return Call(script("backlog"), (*keys.lanes, keys.parked, keys.due), (), read)


def deploy(
    keys: DeploymentKeys, revision: str, code: str, config: str, definition: bytes, limits: Sequence[str],
    *, configured: bool, staying: tuple[str, str] = ("", ""),
) -> Call[str]:  # fmt: skip
    """Answers the version: the former one where the replicas can stay, else `revision`. `limits` as `limits.lua` has them.

    `config` is signed for a new version; `staying` is the version that may stay, and the config signed for that.
    """
    arguments = (revision, code, "configured" if configured else "", config, definition, *limits, *staying)
    return Call(script("deploy"), (keys.config, keys.status, keys.definition), arguments, bytes.decode)


def withdraw(
    keys: DeploymentKeys, revision: str, back_to: str, config: str, message: str, traceback: str, limits: Sequence[str]
) -> Call[Withdrawn]:
    return Call(
        script("withdraw"),
        (keys.config, keys.status),
        (revision, back_to, config, message, traceback, *limits),
        lambda reply: Withdrawn(reply.decode()),
    )


def note(keys: DeploymentKeys, revision: str, fields: dict[str, str]) -> Call[int]:
    """Writes to the deployment's status; answers 0 if it is gone, or of another revision ("": any will do)."""
    flat = [part for item in fields.items() for part in item]
    return Call(script("note"), (keys.config, keys.status), (revision, *flat), int)


def close(keys: DeploymentKeys, revision: str) -> Call[int]:
    return Call(script("close"), (keys.config, keys.definition), (revision,), int)


def remove(keys: DeploymentKeys) -> Call[Removed]:
    """Delete what is left of a closed deployment, if nothing is open. Its results stay until their TTL."""
    return Call(script("remove"), (keys.config, keys.open, *keys.owned), (), lambda reply: Removed(reply.decode()))


def replace(keys: Keys, app: str, read: bytes, record: str) -> Call[int]:
    """Answers 0 if the application's record is not (any more) the one that was read."""
    return Call(script("replace"), (keys.apps,), (app, read, record), int)


def enlist(key: str, name: str, record: str, *, only_if_new: bool = False) -> Call[int]:
    """`key`: the list of nodes, of a deployment's replicas, or of what a node should run."""
    return Call(script("enlist"), (key,), (name, record, "new" if only_if_new else ""), int)


def decide(keys: DeploymentKeys, fence: int, target: int, reason: str, record: dict[str, Any]) -> Call[str]:
    """Answers "decided", "fenced" or "gone"."""
    fields = [part for item in record.items() for part in item]
    return Call(
        script("decide"), (keys.status, keys.scaling, keys.config), (fence, target, reason, *fields), bytes.decode
    )


def lead(keys: Keys, autoscaler: str, ttl_s: float) -> Call[int]:
    """Answers the leader's fencing number, 0 when another one leads."""
    return Call(script("lead"), (keys.leader, keys.fence), (autoscaler, int(ttl_s * 1000)), int)
