"""The verdict: what the ledgers, the faults and the server say, put together. Pure.

A request is *lost* when its caller got an error that its code did not raise, or when nothing is known of its ref. Its
result is *accepted twice* when the server took two outcomes, or when two readers got values of two attempts. An attempt
beyond the first is *explained* when the one before it raised, or ran on a replica that a recorded fault ended. A caller
*hangs* when its request had no end long after the last fault was over. What falls into the last seconds before a server
that loses them stands apart (`near_a_loss`).
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from chaos.ledger import Line
from chaos.plan import Harm, Kind

LOST_S = 2.0  # with appendfsync everysec, what a server that dies may have written to no disk
SETTLES_S = 3.0  # what a loss does to those who had seen more than the server knows goes on so long after it is back
ENDING = (Harm.KILL_REPLICA, Harm.VANISH_HOST, Harm.STOP_REPLICA)  # harm that ends attempts


@dataclass(frozen=True, slots=True)
class Fault:
    """One that was done. `until_s` is when it was over: for a kill of what is started again, when that was."""

    at_s: float
    until_s: float
    harm: Harm
    pids: tuple[int, ...] = ()
    loses_data: bool = False
    kills: int = 0


@dataclass(frozen=True, slots=True)
class Stored:
    """What the server says of a ref in the end: its state ("unknown" if nothing), and the token of its value."""

    state: str
    token: str = "-"


@dataclass(slots=True)
class Verdict:
    requests: int = 0
    attempts: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    accepted_twice: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    left_in_server: list[str] = field(default_factory=list)
    near_a_loss: list[str] = field(default_factory=list)
    left_by_killed_clients: int = 0  # never to be found again: their refs died with their client
    followed: int = 0  # by a successor of the client that had sent them
    extra_attempts: int = 0
    takeovers: dict[str, list[float]] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.accepted_twice or self.unexplained or self.hung or self.left_in_server)


def judge(
    lines: Sequence[Line],
    faults: Sequence[Fault],
    stored: Mapping[str, Stored],
    left_in_server: Iterable[str] = (),
    health_timeout_s: float = 0.0,
) -> Verdict:
    """`lines` are those of clients and replicas; `stored` is by ref id, of all that are in the ledger."""
    return _Case(lines, faults, stored, health_timeout_s).verdict(left_in_server)


@dataclass(slots=True)
class _Attempt:
    start_s: float
    pid: int
    token: str
    ended_s: float | None = None  # its code returned or raised
    has_raised: bool = False


class _Case:
    def __init__(
        self, lines: Sequence[Line], faults: Sequence[Fault], stored: Mapping[str, Stored], health_timeout_s: float
    ) -> None:
        self._lines = sorted(lines, key=lambda line: line.at_s)
        self._faults, self._stored, self._health_timeout_s = faults, stored, health_timeout_s
        self._losses = [fault for fault in faults if fault.loses_data]
        self._attempts = _attempts(self._lines)
        self._submitted: dict[str, Line] = {}
        self._ends: dict[str, list[Line]] = defaultdict(list)
        self._refs: dict[str, str] = {}
        for line in self._lines:
            match line.event:
                case "submit":
                    self._submitted.setdefault(line.who, line)
                case "end":
                    self._ends[line.who].append(line)
                case "ref":
                    self._refs[line.who] = line.what
        self._killed = self._killed_clients()

    def verdict(self, left_in_server: Iterable[str]) -> Verdict:
        verdict = Verdict(requests=len(self._submitted), left_in_server=list(left_in_server))
        verdict.attempts = sum(map(len, self._attempts.values()))
        for name, submit in self._submitted.items():
            self._look_at_end(verdict, name, submit)
        self._look_at_attempts(verdict)
        self._look_at_what_was_accepted(verdict)
        self._time_takeovers(verdict)
        return verdict

    def _killed_clients(self) -> dict[str, float]:
        """Generations of clients that were killed, and when."""
        hit = {pid: fault.at_s for fault in self._faults if fault.harm is Harm.KILL_CLIENT for pid in fault.pids}
        return {
            line.who: hit[int(line.what)] for line in self._lines if line.event == "begin" and int(line.what) in hit
        }

    # ends

    def _look_at_end(self, verdict: Verdict, name: str, submit: Line) -> None:
        ends, ref_id = self._ends.get(name, []), self._refs.get(name)
        if not ends:
            if ref_id is None and submit.what in self._killed and submit.more != Kind.KEYED:
                verdict.left_by_killed_clients += 1
            else:
                verdict.hung.append(f"{name} ({submit.more})")
            return
        verdict.followed += self._killed.get(submit.what, math.inf) < ends[-1].at_s
        for end in ends:
            what = end.what if end.what in ("ok", "cancelled") else "error"
            verdict.ended[what] = verdict.ended.get(what, 0) + 1
            if what == "error" or (what == "cancelled" and submit.more != Kind.CANCEL):
                place = verdict.near_a_loss if self._is_near_a_loss(submit.at_s, end.at_s) else verdict.lost
                place.append(f"{name} ({submit.more}): {end.what}")
        if ref_id is not None:
            self._compare(verdict, name, ends[-1], self._stored.get(ref_id, Stored("unknown")))

    def _compare(self, verdict: Verdict, name: str, end: Line, stored: Stored) -> None:
        """The client and the server must say the same."""
        expected = {"ok": "succeeded", "cancelled": "cancelled"}.get(end.what)
        if expected is None or (stored.state == expected and stored.token == end.more):
            return
        text = f"{name}: its client got {end.what} {end.more}, the server has {stored.state} {stored.token}"
        if self._is_near_a_loss(end.at_s, end.at_s):
            verdict.near_a_loss.append(text)
        elif stored.state == expected:
            verdict.accepted_twice.append(text)
        else:
            verdict.lost.append(text)

    def _is_near_a_loss(self, from_s: float, to_s: float) -> bool:
        """Did the server lose data while this went on, or shortly after?"""
        return any(from_s - SETTLES_S < loss.until_s and loss.at_s - LOST_S < to_s for loss in self._losses)

    # attempts

    def _look_at_attempts(self, verdict: Verdict) -> None:
        ends = self._ends
        for name, attempts in self._attempts.items():
            for before, after in itertools.pairwise(attempts):
                verdict.extra_attempts += 1
                if before.has_raised or self._was_hit(before, after.start_s):
                    continue
                text = f"{name}: {before.token} started at {before.start_s:.3f}, {after.token} at {after.start_s:.3f}"
                if self._is_near_a_loss(before.start_s, after.start_s):
                    verdict.near_a_loss.append(text)
                else:
                    ended = ", ".join(f"{end.what} {end.more}" for end in ends.get(name, []))
                    verdict.unexplained.append(f"{text}; its end: {ended}")

    def _was_hit(self, attempt: _Attempt, next_start_s: float) -> bool:
        """Did a fault end the replica that had this attempt, before there was another?"""
        return any(
            fault.harm in ENDING and attempt.pid in fault.pids and attempt.start_s <= fault.until_s and fault.at_s <= next_start_s
            for fault in self._faults
        )  # fmt: skip

    def _look_at_what_was_accepted(self, verdict: Verdict) -> None:
        accepted: dict[str, dict[str, float]] = defaultdict(dict)
        for line in self._lines:
            if line.event == "accepted":
                accepted[line.who].setdefault(line.what, line.at_s)
        for ref, entries in accepted.items():
            if len(entries) > 1:
                first_s, last_s = min(entries.values()), max(entries.values())
                text = f"ref {ref}: {', '.join(entries)}"
                near = self._is_near_a_loss(first_s, last_s)
                (verdict.near_a_loss if near else verdict.accepted_twice).append(text)

    # replicas

    def _time_takeovers(self, verdict: Verdict) -> None:
        """From the fault (for one that only stopped: from its health timeout) to the next attempt of what ran there."""
        for fault in self._faults:
            if fault.harm not in ENDING:
                continue
            times = []
            for attempts in self._attempts.values():
                for before, after in itertools.pairwise(attempts):
                    ran = before.pid in fault.pids and before.start_s < fault.at_s and not before.has_raised
                    if ran and (before.ended_s is None or before.ended_s > fault.at_s) and after.start_s > fault.at_s:
                        times.append(after.start_s - fault.at_s)
            if times:
                if fault.harm is Harm.STOP_REPLICA:
                    times = [max(0.0, t - self._health_timeout_s) for t in times]
                also = self._others_during(fault, max(times) + self._health_timeout_s)
                name = f"{fault.harm}, with another fault" if also else str(fault.harm)
                verdict.takeovers.setdefault(name, []).extend(times)

    def _others_during(self, fault: Fault, lasted_s: float) -> bool:
        """Was something else amiss that a takeover needs: a launcher, the server, the way to it?"""
        needed = (Harm.SERVER, Harm.STALL, Harm.CUT, Harm.KILL_LAUNCHER, Harm.PAUSE_LAUNCHER, Harm.VANISH_HOST)
        return any(
            other is not fault and other.harm in needed and other.at_s < fault.at_s + lasted_s and fault.at_s < other.until_s + 1.0
            for other in self._faults
        )  # fmt: skip


def _attempts(lines: Sequence[Line]) -> dict[str, list[_Attempt]]:
    """Of each request, in the order of their starts."""
    attempts: dict[str, list[_Attempt]] = defaultdict(list)
    by_token: dict[str, _Attempt] = {}
    for line in lines:
        if line.event == "start":
            by_token[line.more] = attempt = _Attempt(line.at_s, int(line.what), line.more)
            attempts[line.who].append(attempt)
        elif line.event in ("done", "raised") and line.more in by_token:
            by_token[line.more].ended_s = line.at_s
            by_token[line.more].has_raised = line.event == "raised"
    return attempts
