"""The broker in plain Python: what each script does to the requests of one deployment, and what it answers.

It computes nothing that the server chooses (entry ids, times): `learn` takes those over from what was read there. It is
written from docs/internals.md and from the headers of the scripts: where the two differ, one of them is wrong.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from millstream.broker.call import Call
from millstream.broker.control_scripts import Removed
from millstream.broker.keys import LANES, DeploymentKeys
from millstream.broker.scripts import Ended, Finished, Forestalled, Requeued, Submitted, Supplied
from millstream.broker.states import State

HELD = (State.PARKED, State.DELAYED)


class Refusal(Exception):
    """The script answers an error that begins with this word."""


@dataclass(slots=True)
class Request:
    """One request that is open, or a dead letter."""

    ref: str
    lane: str
    client: str
    state: State = State.QUEUED
    entry: str = ""  # in its lane; "" until it is learned
    replica: str = ""
    origin: str = ""  # the lane that it was first sent to, once it has left that
    values: dict[str, bytes | None] = field(default_factory=dict)  # ref id -> value, None where that is missing
    is_later: bool = False  # its time has not come
    has_deadline: bool = False
    is_overdue: bool = False
    max_attempts: int | None = None
    attempt: int = 1
    retries: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    has_payload: bool = False
    readers: list[str] = field(default_factory=list)
    waiters: list[str] = field(default_factory=list)
    holds: list[str] = field(default_factory=list)

    @property
    def place(self) -> str:
        return str(self.state) if self.state in HELD else f"{self.lane} {self.entry}"

    @property
    def missing(self) -> set[str]:
        return {ref_id for ref_id, value in self.values.items() if value is None}

    def sight(self) -> dict[str, Any]:
        """As `reading.read` finds it on the server."""
        return {
            "place": self.place,
            "state": self.state,
            "lane": self.lane,
            "replica": self.replica,
            "client": self.client,
            "origin": self.origin,
            "attempt": self.attempt,
            "retries": self.retries,
            "history": self.history,
            "max_attempts": self.max_attempts,
            "values": {ref_id: value for ref_id, value in self.values.items() if value is not None},
            "missing": self.missing,
            "has_deadline": self.has_deadline,
            "has_payload": self.has_payload,
            "readers": self.readers,
            "waiters": self.waiters,
            "holds": self.holds,
        }


@dataclass(slots=True)
class Stream:
    """The items of one streaming request: numbers from `read` to `count` are there."""

    read: int = 0
    count: int = 0


@dataclass(slots=True)
class Deployment:
    """What the server holds of one deployment."""

    keys: DeploymentKeys
    max_attempts: int | None = None  # None: it does not exist
    max_queued: int | None = None
    has_timeout: bool = False
    has_groups: bool = False
    open: dict[str, Request] = field(default_factory=dict)
    results: dict[str, bytes] = field(default_factory=dict)  # b"" until it is learned
    died: dict[str, list[dict[str, Any]]] = field(
        default_factory=dict
    )  # ref -> history, while its result is to be learned
    dead: list[tuple[str, Request]] = field(default_factory=list)  # entry id ("" until it is learned), letter
    replicas: set[str] = field(default_factory=set)
    leases: set[str] = field(default_factory=set)
    payloads: dict[str, bool] = field(default_factory=dict)  # ref -> is it permanent?
    large_values: set[str] = field(default_factory=set)  # keys
    streams: dict[str, Stream] = field(default_factory=dict)
    _waiters: list[tuple[str, str]] = field(default_factory=list)  # of what has ended in this call

    def call(self, call: Call[Any]) -> Any:
        """Carry out a script; what it answers, as `normal` has it. Raises Refusal."""
        self._waiters = []
        arguments = [part.decode(errors="replace") if isinstance(part, bytes) else str(part) for part in call.arguments]
        return getattr(self, call.script.name)(call, arguments)

    def learn(self, places: dict[str, str], results: dict[str, bytes], dead: list[str]) -> None:
        """Take over what the server has chosen."""
        for ref, request in self.open.items():
            if request.state not in HELD and not request.entry:
                lane, _, request.entry = places.get(ref, "").partition(" ")
                assert lane == request.lane, (
                    f"{ref} should be in the lane {request.lane}, and is at {places.get(ref)!r}"
                )
        for ref, history in self.died.items():
            header, _, body = results[ref].partition(b"\n")
            assert header == self.results[ref].rstrip() and without_times(json.loads(body)) == history
            self.results[ref] = results[ref]
        self.died = {}
        known = {entry for entry, _ in self.dead}
        new = iter([entry for entry in dead if entry not in known])
        self.dead = [(entry or next(new), letter) for entry, letter in self.dead]

    # those that take requests in

    def submit(self, call: Call[Any], arguments: list[str]) -> dict[int, Submitted]:
        if self.max_attempts is None:
            raise Refusal("NODEPLOYMENT")
        client = arguments[0]
        known: dict[int, Submitted] = {}
        room = float("inf") if self.max_queued is None else self.max_queued - self._waiting()
        for position, (lane, _, extras, ref, _) in enumerate(in_groups(arguments[1:], 3, 2)):
            request = self._asked(ref, lane, client, extras)
            answer = self._known(request)
            if answer is Submitted.NEW and room <= 0:
                answer = Submitted.FULL
            elif answer is Submitted.NEW:
                answer = self._take_in(request)
            if answer is not Submitted.NEW:
                known[position] = answer
            else:
                room -= 1
        return known

    def hold(self, call: Call[Any], arguments: list[str]) -> list[Submitted]:
        if self.max_attempts is None:
            raise Refusal("NODEPLOYMENT")
        client, i, answers = arguments[0], 2, []
        while i < len(arguments):
            ref, lane, _, extras, _, delay_ms, _, count = arguments[i : i + 8]
            request = self._asked(ref, lane, client, extras)
            request.values = dict.fromkeys(arguments[i + 8 : i + 8 + int(count)])
            request.state = State.PARKED if request.values else State.DELAYED
            request.is_later = int(delay_ms) > 0
            answer = self._known(request)
            answers.append(self._take_in(request) if answer is Submitted.NEW else answer)
            i += 8 + int(count)
        return answers

    def _asked(self, ref: str, lane: str, client: str, extras: str) -> Request:
        asked = json.loads(extras) if extras else {}
        return Request(
            ref, lane, client, max_attempts=asked.get("attempts"), has_payload="payload" in asked,
            has_deadline=self.has_timeout or "timeout_ms" in asked,
        )  # fmt: skip

    def _known(self, request: Request) -> Submitted:
        if (there := self.open.get(request.ref)) is not None:
            if request.has_payload and there.has_payload:
                self._make_permanent(request.ref)
            return Submitted.OPEN
        return Submitted.DONE if request.ref in self.results else Submitted.NEW

    def _take_in(self, request: Request) -> Submitted:
        if request.has_payload and not self._make_permanent(request.ref):
            return Submitted.MISSING
        self.open[request.ref] = request
        return Submitted.NEW

    def _make_permanent(self, ref: str) -> bool:
        if ref in self.payloads:
            self.payloads[ref] = True
        return ref in self.payloads

    def _waiting(self) -> int:
        return sum(one.state is State.QUEUED and one.lane != "returned" for one in self.open.values())

    # those that move them

    def claim(self, call: Call[Any], arguments: list[str]) -> list[tuple[str, str]]:
        replica, free = arguments[0], int(arguments[1])
        if len(self.replicas) > 1:
            waiting = sum(one.state is State.QUEUED for one in self.open.values())
            free = min(free, -(-waiting // len(self.replicas)))
        taken = [one for lane in LANES for one in self.in_lane(lane) if one.state is State.QUEUED][:free]
        for one in taken:
            one.state, one.replica = State.RUNNING, replica
        return [(one.lane, one.ref) for one in taken]

    def in_lane(self, lane: str) -> list[Request]:
        there = (one for one in self.open.values() if one.state not in HELD and one.lane == lane and one.entry)
        return sorted(there, key=lambda one: [int(part) for part in one.entry.split("-")])

    def hand_back(self, call: Call[Any], arguments: list[str]) -> int:
        lane, count = self._lane_of(call), 0
        for entry in arguments[1:]:
            for one in self.in_lane(lane):
                if one.entry == entry and one.state is State.RUNNING:
                    self._queue(one, arguments[0])
                    count += 1
        return count

    def retry(self, call: Call[Any], arguments: list[str]) -> list[int]:
        refused = []
        for position, (entry, ref, delay_ms, failure) in enumerate(rows(arguments[1:], 4)):
            one = self.open.get(ref)
            if one is None or one.place != f"{arguments[0]} {entry}":
                refused.append(position)
                continue
            one.history = [*one.history, {**json.loads(failure), "attempt": one.attempt}]
            one.attempt, one.retries = one.attempt + 1, one.retries + 1
            one.state, one.lane, one.origin, one.replica, one.entry = State.DELAYED, one.origin or one.lane, "", "", ""
            one.is_later = int(delay_ms) > 0
        return refused

    def wake(self, call: Call[Any], arguments: list[str]) -> int:
        due = [one for one in self.open.values() if one.state is State.DELAYED and not one.is_later]
        for one in due:
            self._queue(one, one.lane)
        return len(due)

    def sweep(self, call: Call[Any], arguments: list[str]) -> tuple[int, dict[str, set[str]], set[str], set[str]]:
        promoted = self.wake(call, arguments)
        holders = {one.replica for one in self.open.values() if one.replica}
        return (
            promoted,
            {one.ref: one.missing for one in self.open.values() if one.state is State.PARKED},
            (self.replicas | holders) - self.leases,
            {one.ref for one in self.open.values() if one.is_overdue},
        )

    def supply(self, call: Call[Any], arguments: list[str]) -> list[Supplied]:
        i, answers = 0, []
        values = list(call.arguments)
        while i < len(arguments):
            ref, ref_id, _, count = arguments[i : i + 4]
            answers.append(self._supply_one(ref, ref_id, values[i + 2], arguments[i + 4 : i + 4 + int(count)]))
            i += 4 + int(count)
        return answers

    def _supply_one(self, ref: str, ref_id: str, stored: bytes, keep: list[str]) -> Supplied:
        one = self.open.get(ref)
        if one is None or one.state is not State.PARKED or ref_id not in one.missing:
            return Supplied.GONE
        one.values[ref_id] = stored
        one.holds += keep
        if one.missing:
            return Supplied.PARKED
        if one.is_later:
            one.state = State.DELAYED
            return Supplied.DELAYED
        self._queue(one, one.lane)
        return Supplied.QUEUED

    def release(self, call: Call[Any], arguments: list[str]) -> Any:
        lane, replica, cause, how = arguments
        if how == "expired" and replica in self.leases:
            return "alive"
        requeued = buried = 0
        for one in [one for one in self.in_lane(lane) if one.replica == replica]:
            if self.max_attempts is None:
                self._conclude(one, f"cancelled {one.place}", b"its deployment was deleted")
                continue
            deaths = one.attempt - one.retries
            one.history = [*one.history, {"replica": replica, "cause": cause, "attempt": one.attempt}]
            one.origin = one.origin or lane
            if deaths >= (one.max_attempts or self.max_attempts):
                self._bury(one)
                buried += 1
            else:
                one.attempt += 1
                self._queue(one, "returned")
                requeued += 1
        return requeued, buried, sorted(self._waiters)

    def _bury(self, one: Request) -> None:
        self.died[one.ref] = one.history
        if one.has_payload and one.ref in self.payloads:
            self.payloads[one.ref] = False
        self._conclude(one, f"dead {one.place}", b"", keeps_payload=True)
        self.dead.append(("", one))

    def _queue(self, one: Request, lane: str) -> None:
        one.state, one.lane, one.entry, one.replica = State.QUEUED, lane, "", ""

    # those that end them

    def finish(self, call: Call[Any], arguments: list[str]) -> tuple[dict[int, Finished], list[tuple[str, str]]]:
        lane, refused = arguments[0], {}
        envelopes = [row[-1] for row in in_groups(list(call.arguments)[2:], 2, 3)]
        for position, (_, state, entry, ref, _) in enumerate(in_groups(arguments[2:], 2, 3)):
            place, one = f"{lane} {entry}", self.open.get(ref)
            if one is None or one.place != place:
                refused[position] = self._why_refused(ref, place)
            elif envelopes[position][:1] == b"@" and self.keys.value(ref, entry) not in self.large_values:
                refused[position] = Finished.MISSING
            else:
                self._conclude(one, f"{state} {place}", envelopes[position])
        return refused, sorted(self._waiters)

    def _why_refused(self, ref: str, place: str) -> Finished:
        if ref in self.open:
            return Finished.STALE
        header = self.results.get(ref, b"").partition(b"\n")[0].decode()
        if header in (f"succeeded {place}", f"failed {place}"):
            return Finished.DONE
        return Finished.ENDED if header.partition(" ")[0] in ("", "cancelled", "timed_out") else Finished.STALE

    def reject(self, call: Call[Any], arguments: list[str]) -> list[tuple[str, str]]:
        one = self.open.get(arguments[0])
        if one is not None and one.state is State.PARKED:
            self._conclude(one, "failed - -", call.arguments[2])
        return sorted(self._waiters)

    def cancel(self, call: Call[Any], arguments: list[str]) -> tuple[list[Ended], list[tuple[str, str]]]:
        how, _, why, *refs = arguments
        answers = []
        for ref in refs:
            one = self.open.get(ref)
            if one is None:
                answers.append(Ended.GONE)
            elif how == "timed_out" and not one.is_overdue:
                answers.append(Ended.EARLY)
            else:
                self._end(one, how, why)
                answers.append(Ended.ENDED)
        return answers, sorted(self._waiters)

    def discard(self, call: Call[Any], arguments: list[str]) -> tuple[str, list[tuple[str, str]]]:
        for one in list(self.open.values()):
            if one.state is not State.RUNNING or arguments[4] == "all":
                self._end(one, "cancelled", arguments[3])
        return "0", sorted(self._waiters)

    def forestall(self, call: Call[Any], arguments: list[str]) -> Forestalled:
        ref, _, why = arguments
        if ref in self.open:
            return Forestalled.OPEN
        if ref in self.results:
            return Forestalled.ENDED
        self.results[ref] = f"cancelled - -\n{why}".encode()
        return Forestalled.FORESTALLED

    def _end(self, one: Request, how: str, why: str) -> None:
        self._conclude(one, f"{how} {'- -' if one.state in HELD else one.place}", why.encode())

    def _conclude(self, one: Request, header: str, body: bytes, *, keeps_payload: bool = False) -> None:
        self.results[one.ref] = header.encode() + b"\n" + body
        self._waiters += [(one.ref, waiter) for waiter in one.waiters]
        if one.has_payload and not keeps_payload:
            self.payloads.pop(one.ref, None)
        del self.open[one.ref]

    # dead letters

    def requeue(self, call: Call[Any], arguments: list[str]) -> list[Requeued]:
        if self.max_attempts is None:
            raise Refusal("NODEPLOYMENT")
        return [self._requeue_one(entry) for entry in arguments]

    def _requeue_one(self, entry: str) -> Requeued:
        letter = next((letter for name, letter in self.dead if name == entry), None)
        if letter is None:
            return Requeued.GONE
        if letter.ref in self.open:
            return Requeued.OPEN
        if not self.results.get(letter.ref, b"dead").startswith(b"dead"):
            return Requeued.ENDED
        if letter.has_payload and not self._make_permanent(letter.ref):
            return Requeued.MISSING
        self.dead = [row for row in self.dead if row[0] != entry]
        self.results.pop(letter.ref, None)
        lane = letter.origin if letter.origin in ("high", "low") else "normal"
        self.open[letter.ref] = Request(
            letter.ref, lane, letter.client, values=letter.values, max_attempts=letter.max_attempts,
            history=letter.history, has_payload=letter.has_payload,
        )  # fmt: skip
        return Requeued.QUEUED

    def drop(self, call: Call[Any], arguments: list[str]) -> int:
        dropped = [letter for entry, letter in self.dead if entry in arguments]
        for letter in dropped:
            if letter.has_payload and letter.ref not in self.open:
                self.payloads.pop(letter.ref, None)
        self.dead = [row for row in self.dead if row[0] not in arguments]
        return len(dropped)

    # those that look, and those about streams

    def watch(self, call: Call[Any], arguments: list[str]) -> list[bytes]:
        how, answers = arguments[0], []
        for ref, who in rows(arguments[1:], 2):
            if (stored := self.results.get(ref)) is not None:
                answers.append(stored)
                continue
            one = self.open.get(ref)
            answers.append(b"unknown" if one is None else b"open")
            if one is not None and how:
                names = one.readers if how == "readers" else one.waiters
                if who not in names:
                    names.append(who)
        return answers

    def emit(self, call: Call[Any], arguments: list[str]) -> tuple[bool, int]:
        ref, place, _, _, first, *envelopes = arguments
        if ref not in self.open or self.open[ref].place != place:
            return False, 0
        stream = self.streams.setdefault(ref, Stream())
        stream.count = max(stream.count, int(first) + len(envelopes))
        return True, 0 if envelopes else stream.read

    def consume(self, call: Call[Any], arguments: list[str]) -> int:
        stream = self.streams.setdefault(arguments[0], Stream())
        read = min(max(stream.read, int(arguments[1])), stream.count)
        removed, stream.read = read - stream.read, read
        return removed

    # those about the deployment and its replicas

    def groups(self, call: Call[Any], arguments: list[str]) -> int:
        made, self.has_groups = 0 if self.has_groups else len(LANES), True
        return made

    def deploy(self, call: Call[Any], arguments: list[str]) -> None:
        self.max_attempts, max_queued = int(arguments[5]), arguments[7]
        self.max_queued, self.has_timeout = int(max_queued) if max_queued else None, arguments[8] != ""

    def close(self, call: Call[Any], arguments: list[str]) -> None:
        self.max_attempts = None

    def remove(self, call: Call[Any], arguments: list[str]) -> Removed:
        if self.max_attempts is not None:
            return Removed.DEPLOYED
        if self.open:
            return Removed.OPEN
        self.has_groups, self.dead = False, []
        self.replicas.clear()
        return Removed.REMOVED

    def renew(self, call: Call[Any], arguments: list[str]) -> int:
        self.leases |= {key.removeprefix(self.keys.lease_prefix) for key in call.keys}
        return len(call.keys)

    def enlist(self, call: Call[Any], arguments: list[str]) -> int:
        self.replicas.add(arguments[0])
        return 1

    def keep(self, call: Call[Any], arguments: list[str]) -> int:
        return sum(key in self.large_values for key in call.keys)

    def command(self, name: str, key: str, *rest: Any) -> None:
        """A plain command that changes something."""
        match name:
            case "SET" if key.startswith(self.keys.payload_prefix):
                self.payloads[key.removeprefix(self.keys.payload_prefix)] = False
            case "SET":
                self.large_values.add(key)
            case "HDEL":
                self.replicas -= {*rest}
            case "DEL" if key.startswith(self.keys.lease_prefix):
                self.leases.discard(key.removeprefix(self.keys.lease_prefix))
            case "UNLINK":
                self.results.pop(key.removeprefix(self.keys.result_prefix), None)
                self.payloads.pop(key.removeprefix(self.keys.payload_prefix), None)
                self.large_values.discard(key)

    # as the server is read

    def sights(self) -> dict[str, dict[str, Any]]:
        return {ref: one.sight() for ref, one in self.open.items()}

    def letters(self) -> list[tuple[str, int, int, list[dict[str, Any]]]]:
        return [(one.ref, one.attempt, one.retries, one.history) for _, one in self.dead]

    def _lane_of(self, call: Call[Any]) -> str:
        return call.keys[0].removeprefix(self.keys.prefix)


def rows(flat: list[Any], width: int) -> Iterator[list[Any]]:
    return (flat[i : i + width] for i in range(0, len(flat), width))


def in_groups(flat: list[Any], head: int, width: int) -> Iterator[list[Any]]:
    """Rows of `head` and `width` parts, out of groups: a head, a count, and so many of each column."""
    while flat:
        count = int(flat[head])
        columns = rows(flat[head + 1 : head + 1 + count * width], count)
        for row in zip(*columns, strict=True):
            yield [*flat[:head], *row]
        flat = flat[head + 1 + count * width :]


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what the server's clock said."""
    return [{name: value for name, value in row.items() if name != "at_ms"} for row in history]


def tag_of(key: str) -> str:
    """The tag of the deployment that a key belongs to."""
    found = re.match(r"\{ms:([^}]+)\}:", key)
    assert found is not None, key
    return found[1]
