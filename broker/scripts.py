"""The Lua scripts that move requests, each declared once, with a typed wrapper that names its keys and reads its reply.

Those about deployments, replicas and their watchers are in `control_scripts`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from millstream.broker.call import Call, script
from millstream.broker.keys import DeploymentKeys
from millstream.broker.states import State

ROW = 5  # parts of a request in a submit, of an outcome in a finish
SWEEP_LIMIT = 100  # bounded loops: a script stalls everybody (100 releases take 2 to 3 ms)
HOLD_MS = 3_600_000  # a large value that an open request will read is kept for an hour at a time
BURIED_TTL_S = 3600  # the result of what nobody can read
REPAIR_AFTER_MS = 3000  # a parked request is looked after this often; its submitter and its upstream do it at once


class Submitted(StrEnum):
    NEW = "new"
    OPEN = "open"  # it is pending already: a retried submit, or an idempotency key in use
    DONE = "done"  # it has ended already; its result is there
    FULL = "full"  # refused: as many wait as max_queued_requests allows
    MISSING = "missing"  # refused: its large payload is not under its key (any more)


class Finished(StrEnum):
    DONE = "done"  # this very attempt finished before; the reply was lost
    STALE = "stale"  # the attempt was taken over: its value is not stored
    ENDED = "ended"  # the request was cancelled, timed out, or its result was dropped: its value is not stored
    MISSING = "missing"  # its large value is not under its key (any more): to be written again


class Ended(StrEnum):
    """What `cancel` did about one request."""

    ENDED = "ended"
    GONE = "gone"  # it is not open (any more)
    EARLY = "early"  # to be expired, and its deadline has not passed


class Forestalled(StrEnum):
    FORESTALLED = "forestalled"
    OPEN = "open"  # it has come: it can be cancelled
    ENDED = "ended"


class Requeued(StrEnum):
    """What `requeue` did about one dead letter."""

    QUEUED = "queued"
    GONE = "gone"  # it was requeued, dropped or bounded away before
    OPEN = "open"  # a request of the same idempotency key is pending
    ENDED = "ended"  # or has ended since
    MISSING = "missing"  # its large arguments have expired
    UNUSABLE = "unusable"  # it is no request: somebody wrote it into a lane


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


def _positions(word: type[StrEnum]) -> Callable[[Any], Any]:
    def read(reply: list[Any]) -> dict[int, Any]:
        return {int(reply[i]): word(reply[i + 1].decode()) for i in range(0, len(reply), 2)} if reply else {}

    return read


_read_known = _positions(Submitted)
_read_refused = _positions(Finished)


def _waiters(flat: list[bytes]) -> list[Waiter]:
    return [Waiter(flat[i], flat[i + 1].decode()) for i in range(0, len(flat), 2)]


def _ending(keys: DeploymentKeys) -> tuple[str, str, str]:
    """The keys of what an open request may have beside its place, its notes and its result."""
    return keys.deadlines, keys.holds, keys.payload_prefix


def submit(keys: DeploymentKeys, client: str, requests: Sequence[Any]) -> Call[dict[int, Submitted]]:
    """`requests`: flat ref, lane, method, extras, envelope. Answers position -> what it was, if not taken in as new."""
    arguments = (client, *_grouped(requests, same=(1, 2, 3), own=(0, 4)))
    return Call(script("submit"), keys.of_submit, arguments, _read_known)


def _grouped(flat: Sequence[Any], *, same: Sequence[int], own: Sequence[int]) -> list[Any]:
    """Rows of five, flat, as the scripts take them (columns.lua): for each run of rows what is the `same` in them, their number,
    and the columns of what each has of its `own`. Fewer arguments: each costs client and server a fifth of a microsecond."""
    if len(flat) == ROW:
        return [*map(flat.__getitem__, same), 1, *map(flat.__getitem__, own)]
    if not flat:
        return []
    columns = [flat[i::ROW] for i in range(ROW)]
    count = len(columns[0])
    if all(columns[i].count(columns[i][0]) == count for i in same):  # nearly always
        ends = [count]
    else:
        heads = list(zip(*(columns[i] for i in same), strict=True))
        ends = [i for i in range(1, count) if heads[i] != heads[i - 1]] + [count]
    arguments: list[Any] = []
    start = 0
    for end in ends:
        arguments += [columns[i][start] for i in same]
        arguments.append(end - start)
        for i in own:
            arguments += columns[i][start:end] if len(ends) > 1 else columns[i]
        start = end
    return arguments


class Held(NamedTuple):
    """A request that waits for refs, for `delay_ms` to pass, or for `due_ms` on the server's clock."""

    ref: bytes
    lane: Any
    method: bytes
    extras: bytes
    envelope: bytes
    delay_ms: int
    due_ms: int
    depends_on: Iterable[str]


def hold_all(keys: DeploymentKeys, client: str, requests: Iterable[Held]) -> Call[list[Submitted]]:
    """Answers for each what it was: NEW, OPEN, DONE or MISSING."""
    arguments: list[Any] = [client, REPAIR_AFTER_MS]
    for request in requests:
        depends_on = [*request.depends_on]
        arguments += (*request[:7], len(depends_on), *depends_on)
    return Call(
        script("hold"),
        (
            keys.config, keys.open, keys.result_prefix, keys.held, keys.parked, keys.due,
            keys.notes, keys.deadlines, keys.payload_prefix, keys.supplied_prefix,
        ),
        arguments,
        lambda reply: [Submitted(answer.decode()) for answer in reply],
    )  # fmt: skip


def hold(
    keys: DeploymentKeys, client: str, ref: bytes, lane: str, method: bytes, envelope: bytes,
    *, extras: bytes = b"", delay_ms: int = 0, due_ms: int = 0, depends_on: Iterable[str] = (),
) -> Call[Submitted]:  # fmt: skip
    """As `hold_all`, of one request."""
    call = hold_all(keys, client, [Held(ref, lane, method, extras, envelope, delay_ms, due_ms, depends_on)])
    return Call(call.script, call.keys, call.arguments, lambda reply: call.read(reply)[0])


class Value(NamedTuple):
    """The value of a ref, for a parked request; with keys, also of other slots, that must live until that has ended."""

    waiter: str
    value_id: str
    stored: bytes
    keep: Iterable[str] = ()


def supply_all(keys: DeploymentKeys, values: Iterable[Value]) -> Call[list[Supplied]]:
    arguments: list[Any] = []
    for value in values:
        kept = [*value.keep]
        arguments += (*value[:3], len(kept), *kept)
    return Call(
        script("supply"),
        (keys.open, keys.parked, keys.due, keys.held, keys.supplied_prefix, keys.prefix, keys.holds),
        arguments,
        lambda reply: [Supplied(answer.decode()) for answer in reply],
    )


def supply(keys: DeploymentKeys, ref: str, value_id: str, stored: bytes, keep: Iterable[str] = ()) -> Call[Supplied]:
    """As `supply_all`, of one value."""
    call = supply_all(keys, [Value(ref, value_id, stored, keep)])
    return Call(call.script, call.keys, call.arguments, lambda reply: call.read(reply)[0])


def keep(same_slot: Sequence[str], ttl_ms: int = HOLD_MS) -> Call[int]:
    """Have keys of one slot live at least so long; how many of them exist."""
    return Call(script("keep"), same_slot, (ttl_ms,), int)


def reject(keys: DeploymentKeys, ref: str, ttl_s: int, envelope: bytes) -> Call[list[Waiter]]:
    return Call(
        script("reject"),
        (
            keys.parked, keys.open, keys.notes, keys.result_prefix, keys.reply_prefix, keys.held,
            keys.supplied_prefix, *_ending(keys),
        ),
        (ref, ttl_s, envelope),
        lambda reply: _waiters(reply[1]),
    )  # fmt: skip


def cancel(
    keys: DeploymentKeys, ttl_s: int, why: str, refs: Sequence[Any], *, overdue: bool = False
) -> Call[tuple[list[tuple[Ended, int]], list[Waiter]]]:
    """End open requests as cancelled, or, where `overdue`, as timed out, if the server's clock agrees.

    Answers per ref what was done (with EARLY: the ms until its deadline, -1 without one), and who waited for them.
    """

    def read_one(answer: Any) -> tuple[Ended, int]:
        return (Ended.EARLY, answer) if isinstance(answer, int) else (Ended(answer.decode()), 0)

    return Call(
        script("cancel"),
        _taking(keys),
        ("timed_out" if overdue else "cancelled", ttl_s, why, *refs),
        lambda reply: ([read_one(answer) for answer in reply[0]], _waiters(reply[1])),
    )


def forestall(keys: DeploymentKeys, ref: str, ttl_s: int, why: str) -> Call[Forestalled]:
    """End a request of one's own that may still be on its way to the server, as cancelled."""
    return Call(
        script("forestall"),
        (keys.open, keys.result(ref)),
        (ref, ttl_s, why),
        lambda reply: Forestalled(reply.decode()),
    )


def _taking(keys: DeploymentKeys) -> tuple[str, ...]:
    """The keys of whatever ends requests from outside."""
    return (
        keys.open, keys.notes, keys.result_prefix, keys.reply_prefix, keys.prefix,
        keys.held, keys.parked, keys.due, *_ending(keys), keys.orders_prefix, keys.supplied_prefix,
    )  # fmt: skip


def wake(keys: DeploymentKeys) -> Call[int]:
    """Promote delayed requests that are due; how many."""
    return Call(
        script("wake"), (keys.due, keys.open, keys.held, keys.supplied_prefix, keys.prefix), (SWEEP_LIMIT,), int
    )


def claim(keys: DeploymentKeys, replica: str, free: int, direct: int = 0) -> Call[tuple[int, list[Any]]]:
    """Answers how many direct reads of the last lane may follow, and what XREADGROUP would: [[lane, [[id, fields], ...]], ...]."""
    return Call(script("claim"), (*keys.lanes, keys.replicas), (replica, free, direct), tuple)


def finish(
    keys: DeploymentKeys, lane: str, ttl_s: int, outcomes: Sequence[Any]
) -> Call[tuple[dict[int, Finished], list[Waiter]]]:
    """`outcomes`: flat entry id, ref, client, "succeeded" | "failed", envelope (or "@<bytes>": it lies under its value
    key). Answers what was refused, and who waits."""
    arguments = (lane, ttl_s, *_grouped(outcomes, same=(2, 3), own=(0, 1, 4)))
    return Call(script("finish"), keys.of_finish[lane], arguments, _read_finished)


def _read_finished(reply: list[Any]) -> tuple[dict[int, Finished], list[Waiter]]:
    return (_read_refused(reply[0]), _waiters(reply[1])) if reply else ({}, [])


def retry(keys: DeploymentKeys, lane: str, failures: Sequence[Any]) -> Call[list[int]]:
    """`failures`: flat entry id, ref, delay_ms, how the attempt ended (JSON: replica, cause; "" if it did not begin, which
    is none). Answers the positions of those that the attempt does not own any more."""
    return Call(
        script("retry"),
        (keys.lane(lane), keys.open, keys.held, keys.due, keys.supplied_prefix),
        (lane, *failures),
        list,
    )


def emit(
    keys: DeploymentKeys, ref: str, place: str, client: bytes, ttl_s: int, first: int, envelopes: Sequence[bytes]
) -> Call[tuple[bool, int]]:
    """Add items `first`, `first` + 1, ... to a stream. Answers whether its request still runs at `place`, and, where no
    envelopes are given, how many items its reader has read (0 otherwise).

    What is not read yet lives for `ttl_s` from the last call, a minute at least: ask while nothing is emitted.
    """
    return Call(
        script("emit"),
        (keys.open, keys.items(ref), keys.reply_prefix, keys.value_prefix),
        (ref, place, client, ttl_s, first, *envelopes),
        lambda reply: (reply[0] == b"running", reply[1]),
    )


def consume(keys: DeploymentKeys, ref: str, count: int, parts: Iterable[str] = ()) -> Call[int]:
    """The first `count` items of a stream have been read: remove them, and tell its replica. `parts` are those of large
    ones among them, whose values go as well."""
    return Call(
        script("consume"),
        (keys.open, keys.items(ref), keys.prefix, keys.orders_prefix),
        (ref, count, *(keys.value(ref, part) for part in parts)),
        int,
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
            keys.reply_prefix, keys.dead, keys.config, keys.lease(replica), *_ending(keys), keys.status,
        ),
        (lane, replica, cause, "expired" if expired else "died"),
        read,
    )  # fmt: skip


def bury(keys: DeploymentKeys, lane: str, entry: bytes, replica: str, cause: str) -> Call[list[Waiter]]:
    """Put an entry that a replica cannot read with the dead letters, whatever attempts it has left. Twice is as once."""
    return Call(
        script("bury"),
        (
            keys.lane(lane), keys.open, keys.notes, keys.result_prefix, keys.reply_prefix, keys.deadlines, keys.holds,
            keys.payload_prefix, keys.dead, keys.status,
        ),
        (lane, entry, replica, cause, BURIED_TTL_S),
        _waiters,
    )  # fmt: skip


def requeue(keys: DeploymentKeys, entries: Sequence[str]) -> Call[list[Requeued]]:
    """Send dead letters again, named by their entry ids."""
    return Call(
        script("requeue"),
        (
            keys.config, keys.dead, keys.open, keys.result_prefix, keys.prefix, keys.notes, keys.payload_prefix,
        ),
        entries,
        lambda reply: [Requeued(answer.decode()) for answer in reply],
    )  # fmt: skip


def drop(keys: DeploymentKeys, entries: Sequence[str]) -> Call[int]:
    """Forget dead letters; how many there were."""
    return Call(script("drop"), (keys.dead, keys.open, keys.payload_prefix), entries, int)


def discard(
    keys: DeploymentKeys, cursor: str, ttl_s: int, why: str, *, running: bool
) -> Call[tuple[str, list[Waiter]]]:
    """One step of a scan that cancels what is open, `running` requests included or not. Answers the next cursor
    ("0" when through) and who waited for what was cancelled."""
    return Call(
        script("discard"),
        _taking(keys),
        (cursor, SWEEP_LIMIT, ttl_s, why, "all" if running else "waiting"),
        lambda reply: (reply[0].decode(), _waiters(reply[1])),
    )


def hand_back(keys: DeploymentKeys, lane: str, target: str, entries: Iterable[bytes]) -> Call[int]:
    return Call(script("hand_back"), (keys.lane(lane), keys.lane(target), keys.open), (target, *entries), int)


def watch(keys: DeploymentKeys, how: str, who: str, refs: Iterable[Any]) -> Call[list[bytes]]:
    """Per ref: its stored result, b"open" or b"unknown". `how`: "readers", "waiters" or "" (only look)."""
    return watch_all(keys, how, [(ref, who) for ref in refs])


def watch_all(keys: DeploymentKeys, how: str, pairs: Iterable[tuple[Any, str]]) -> Call[list[bytes]]:
    """As `watch`, for pairs of a ref and who waits for it."""
    flat = [part for pair in pairs for part in pair]
    return Call(script("watch"), (keys.open, keys.result_prefix, keys.notes), (how, *flat), lambda reply: reply)


def place(keys: DeploymentKeys, ref: str) -> Call[State | None]:
    """The state of one request; None if it is unknown or its result has expired."""

    def read(reply: bytes) -> State | None:
        return None if reply == b"unknown" else State(reply.decode())

    return Call(script("place"), (keys.open, keys.result(ref), keys.prefix), (ref,), read)
