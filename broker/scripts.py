"""The Lua scripts of `lua/`, each declared once, with a typed wrapper that names its keys and reads its reply.

A wrapper builds a `Call`; `Link.run` (hot transport) or `run` (redis-py) carries it out, and both deal with NOSCRIPT
themselves.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Any, Generic, NamedTuple, TypeVar

from millstream.broker.keys import LANES, DeploymentKeys, Keys

T = TypeVar("T")
SWEEP_LIMIT = 100  # bounded loops: a script stalls everybody (100 releases take 2 to 3 ms)
REPAIR_AFTER_MS = 3000  # a parked request is looked after this often; its submitter and its upstream do it at once


class Submitted(StrEnum):
    NEW = "new"
    OPEN = "open"  # it is pending already: a retried submit, or an idempotency key in use
    DONE = "done"  # it has ended already; its result is there


class Finished(StrEnum):
    DONE = "done"  # this very attempt finished before; the reply was lost
    STALE = "stale"  # the attempt was taken over: its value is not stored


class Withdrawn(StrEnum):
    WITHDRAWN = "withdrawn"
    SUPERSEDED = "superseded"  # another config is in force by now
    SPENT = "spent"  # the one to go back to was withdrawn, too


class Supplied(StrEnum):
    QUEUED = "queued"
    DELAYED = "delayed"
    PARKED = "parked"
    GONE = "gone"


class Waiter(NamedTuple):
    """A parked request that waits for the value of `ref` (of the deployment whose script said so)."""

    ref: bytes
    waiter_id: str


@dataclass(frozen=True, slots=True)
class Released:
    """What a release did: `alive` means it refused, because the replica holds a lease."""

    alive: bool
    requeued: int
    buried: int
    more: bool
    waiters: list[Waiter]


@dataclass(frozen=True, slots=True)
class Swept:
    promoted: int
    stuck: list[tuple[bytes, list[str]]]  # parked ref, the ref ids it misses
    without_lease: list[str]


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


class Script:
    """One Lua file, its includes put in, with its SHA-1."""

    __slots__ = ("name", "sha", "source")

    def __init__(self, name: str) -> None:
        self.name = name
        self.source = "".join(_with_includes(name)).encode()
        self.sha = hashlib.sha1(self.source).hexdigest().encode()


def _with_includes(name: str) -> Iterable[str]:
    text = resources.files("millstream.broker").joinpath("lua", f"{name}.lua").read_text()
    for line in text.splitlines(keepends=True):
        word, _, included = line.strip().partition(" ")
        yield from _with_includes(included) if word == "--include" else (line,)


@cache
def script(name: str) -> Script:
    return Script(name)


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A script with its keys and arguments, and how to read what it answers."""

    script: Script
    keys: Sequence[str]
    arguments: Sequence[Any]
    read: Callable[[Any], T]

    def command(self) -> tuple[Any, ...]:
        return ("EVALSHA", self.script.sha, len(self.keys), *self.keys, *self.arguments)

    def full_command(self) -> tuple[Any, ...]:
        """As `command`, with the source: for a server that answered NOSCRIPT."""
        return ("EVAL", self.script.source, len(self.keys), *self.keys, *self.arguments)


def _positions(word: type[StrEnum]) -> Callable[[Any], Any]:
    def read(reply: list[Any]) -> dict[int, Any]:
        return {int(reply[i]): word(reply[i + 1].decode()) for i in range(0, len(reply), 2)}

    return read


_read_known = _positions(Submitted)
_read_refused = _positions(Finished)


def _waiters(flat: list[bytes]) -> list[Waiter]:
    return [Waiter(flat[i], flat[i + 1].decode()) for i in range(0, len(flat), 2)]


def submit(keys: DeploymentKeys, client: str, requests: Sequence[Any]) -> Call[dict[int, Submitted]]:
    """`requests`: flat ref, lane, method, "matched" | "", envelope. Answers position -> what it was, if not new."""
    return Call(
        script("submit"),
        (keys.config, keys.open, keys.result_prefix, keys.prefix),
        (client, *requests),
        _read_known,
    )


def hold(
    keys: DeploymentKeys, client: str, ref: bytes, lane: str, method: bytes, envelope: bytes,
    *, delay_ms: int = 0, depends_on: Iterable[str] = (),
) -> Call[Submitted]:  # fmt: skip
    local = ref.decode()
    return Call(
        script("hold"),
        (keys.config, keys.open, keys.result(local), keys.held(local), keys.parked, keys.due),
        (client, ref, lane, method, envelope, delay_ms, REPAIR_AFTER_MS, *dict.fromkeys(depends_on)),
        lambda reply: Submitted(reply.decode()),
    )


def supply(keys: DeploymentKeys, ref: str, value_id: str, stored: bytes) -> Call[Supplied]:
    return Call(
        script("supply"),
        (keys.open, keys.parked, keys.due, keys.held_prefix, keys.prefix),
        (ref, value_id, stored),
        lambda reply: Supplied(reply.decode()),
    )


def reject(keys: DeploymentKeys, ref: str, ttl_s: int, envelope: bytes) -> Call[list[Waiter]]:
    return Call(
        script("reject"),
        (keys.parked, keys.open, keys.notes, keys.result_prefix, keys.reply_prefix, keys.held(ref)),
        (ref, ttl_s, envelope),
        lambda reply: _waiters(reply[1]),
    )


def claim(keys: DeploymentKeys, replica: str, free: int, direct: int = 0) -> Call[tuple[int, list[Any]]]:
    """Answers how many direct reads of the last lane may follow, and what XREADGROUP would: [[lane, [[id, fields], ...]], ...]."""
    return Call(script("claim"), (*keys.lanes, keys.replicas), (replica, free, direct), tuple)


def finish(
    keys: DeploymentKeys, lane: str, ttl_s: int, outcomes: Sequence[Any]
) -> Call[tuple[dict[int, Finished], list[Waiter]]]:
    """`outcomes`: flat entry id, ref, client, "succeeded" | "failed", envelope. Answers what was refused, and who waits."""
    return Call(
        script("finish"),
        (keys.lane(lane), keys.open, keys.notes, keys.result_prefix, keys.reply_prefix),
        (lane, ttl_s, *outcomes),
        lambda reply: (_read_refused(reply[0]) if reply[0] else {}, _waiters(reply[1])),
    )


def release(keys: DeploymentKeys, lane: str, replica: str, cause: str, *, expired: bool) -> Call[Released]:
    def read(reply: list[Any]) -> Released:
        if reply[0] == b"alive":
            return Released(True, 0, 0, False, [])
        return Released(False, reply[1], reply[2], bool(reply[3]), _waiters(reply[4]))

    return Call(
        script("release"),
        (
            keys.lane(lane), keys.lane("returned"), keys.open, keys.notes, keys.result_prefix,
            keys.reply_prefix, keys.dead, keys.config, keys.lease(replica),
        ),
        (lane, replica, cause, "expired" if expired else "died"),
        read,
    )  # fmt: skip


def discard(
    keys: DeploymentKeys, cursor: str, ttl_s: int, why: str, *, running: bool
) -> Call[tuple[str, list[Waiter]]]:
    """One step of a scan that cancels what is open, `running` requests included or not. Answers the next cursor
    ("0" when through) and who waited for what was cancelled."""
    return Call(
        script("discard"),
        (
            keys.open, keys.notes, keys.result_prefix, keys.reply_prefix, keys.prefix,
            keys.held_prefix, keys.parked, keys.due,
        ),
        (cursor, SWEEP_LIMIT, ttl_s, why, "all" if running else "waiting"),
        lambda reply: (reply[0].decode(), _waiters(reply[1])),
    )  # fmt: skip


def groups(keys: DeploymentKeys) -> Call[int]:
    """Makes the lanes' consumer groups where they are missing; answers how many."""
    return Call(script("groups"), keys.lanes, (), int)


def hand_back(keys: DeploymentKeys, lane: str, target: str, entries: Iterable[bytes]) -> Call[int]:
    return Call(script("hand_back"), (keys.lane(lane), keys.lane(target), keys.open), (target, *entries), int)


def watch(keys: DeploymentKeys, how: str, who: str, refs: Sequence[Any]) -> Call[list[bytes]]:
    """Per ref: its stored result, b"open" or b"unknown". `how`: "readers", "waiters" or "" (only look)."""
    return Call(script("watch"), (keys.open, keys.result_prefix, keys.notes), (how, who, *refs), lambda reply: reply)


def sweep(keys: DeploymentKeys) -> Call[Swept]:
    return Call(
        script("sweep"),
        (
            *keys.lanes, keys.replicas, keys.due, keys.parked, keys.open,
            keys.held_prefix, keys.prefix, keys.lease_prefix,
        ),
        (SWEEP_LIMIT, REPAIR_AFTER_MS),
        lambda reply: Swept(
            reply[0],
            [(row[0], [ref_id.decode() for ref_id in row[1:]]) for row in reply[1]],
            [name.decode() for name in reply[2]],
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
    keys: DeploymentKeys, revision: str, code: str, fields: dict[str, str], definition: bytes, *, configured: bool
) -> Call[str]:
    """`fields` of the config hash. Answers the version: the former one where the replicas can stay, else `revision`."""
    arguments = (revision, code, "configured" if configured else "", definition, *_flat(fields))
    return Call(script("deploy"), (keys.config, keys.status, keys.definition), arguments, bytes.decode)


def withdraw(
    keys: DeploymentKeys, revision: str, back_to: str, fields: dict[str, str], message: str, traceback: str
) -> Call[Withdrawn]:
    return Call(
        script("withdraw"),
        (keys.config, keys.status),
        (revision, back_to, message, traceback, *_flat(fields)),
        lambda reply: Withdrawn(reply.decode()),
    )


def _flat(fields: dict[str, Any]) -> list[Any]:
    return [part for item in fields.items() for part in item]


def note(keys: DeploymentKeys, revision: str, fields: dict[str, str]) -> Call[int]:
    """Writes to the deployment's status; answers 0 if it is gone, or of another revision ("": any will do)."""
    return Call(script("note"), (keys.config, keys.status), (revision, *_flat(fields)), int)


def close(keys: DeploymentKeys, revision: str) -> Call[int]:
    return Call(script("close"), (keys.config, keys.definition), (revision,), int)


def replace(keys: Keys, app: str, read: str, record: str) -> Call[int]:
    """Answers 0 if the application's record is not (any more) the one that was read."""
    return Call(script("replace"), (keys.apps,), (app, read, record), int)


def enlist(key: str, name: str, record: str, *, only_if_new: bool = False) -> Call[int]:
    """`key`: the list of nodes, of a deployment's replicas, or of what a node should run."""
    return Call(script("enlist"), (key,), (name, record, "new" if only_if_new else ""), int)


def decide(keys: DeploymentKeys, fence: int, target: int, reason: str, record: dict[str, Any]) -> Call[str]:
    """Answers "decided", "fenced" or "gone"."""
    arguments = (fence, target, reason, *_flat(record))
    return Call(script("decide"), (keys.status, keys.scaling, keys.config), arguments, bytes.decode)


def lead(keys: Keys, autoscaler: str, ttl_s: float) -> Call[int]:
    """Answers the leader's fencing number, 0 when another one leads."""
    return Call(script("lead"), (keys.leader, keys.fence), (autoscaler, int(ttl_s * 1000)), int)
