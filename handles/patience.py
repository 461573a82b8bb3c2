"""Requests that would rather wait than be refused where a queue is full: options(when_full="wait").

One line per engine and deployment. It is sent in the order in which it was joined, one batch at a time; what the queue
has no room for stays in front and is asked again, with growing pauses.
"""

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from millstream.broker import scripts
from millstream.broker.scripts import Submitted
from millstream.errors import BrokerUnavailableError
from millstream.handles.hub import Hub
from millstream.handles.lines import PATIENCE_S
from millstream.handles.route import Route, shorten_deadlines

AT_ONCE = 64  # requests per submit call
PAUSE_S = (0.004, 0.25)  # before a full queue is asked again, at first and at last
RETRY_S = 0.05  # for a server that answers and cannot take requests now
Answer = Submitted | Exception


@dataclass(slots=True)
class Patient:
    """One request in the line, as `submit` takes it, and who hears of it once the server has said more than FULL."""

    fields: tuple[bytes, bytes, bytes, bytes, bytes]  # ref, lane, method, extras, envelope
    answered: Callable[[Answer], None]
    is_adopted: bool = False  # of another engine of this process: nobody waits for it here

    @property
    def ref(self) -> bytes:
        return self.fields[0]

    @property
    def size_bytes(self) -> int:
        return len(self.fields[-1])


class Line:
    """Belongs to the engine's loop."""

    def __init__(self, hub: Hub, route: Route) -> None:
        self._hub, self._route = hub, route
        self._waiting: OrderedDict[bytes, Patient] = OrderedDict()
        self._in_the_air: list[Patient] = []
        self._pause: asyncio.TimerHandle | None = None
        self._pause_s = 0.0
        self._stuck_since: float | None = None  # since when the server takes nothing
        self.size_bytes = 0

    def __contains__(self, ref: bytes) -> bool:
        return ref in self._waiting

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def refs(self) -> set[bytes]:
        return set(self._waiting)

    def requests(self) -> list[Any]:
        """All of them, flat. Any thread."""
        return [part for patient in list(self._waiting.values()) for part in patient.fields]

    def join(self, patient: Patient) -> None:
        """Wait for room, behind those who came before. A ref that is in the line already keeps its place."""
        if patient.ref not in self._waiting:
            self._waiting[patient.ref] = patient
            self.size_bytes += patient.size_bytes

    def leave(self, ref: bytes) -> bool:
        """Give up one's place. False if it is under way to the server just now."""
        if any(patient.ref == ref for patient in self._in_the_air):
            return False
        self._drop(ref)
        return True

    def send(self) -> None:
        """Send those in front, unless an answer or the end of a pause is awaited."""
        commands = self._hub.lines.commands
        if self._in_the_air or self._pause is not None or commands is None or not commands.is_up:
            return
        batch = self._in_the_air = self._first()
        if not batch:
            return
        flat = [part for patient in batch for part in patient.fields]
        if self._hub.deadlines:
            shorten_deadlines(flat, self._hub.pending)
        commands.start(scripts.submit(self._route.keys, self._hub.name, flat), self._answered)

    def give_up_if_late(self, error: Exception) -> None:
        """The server cannot be reached: nobody waits for longer than PATIENCE_S for that."""
        now = time.monotonic()
        self._stuck_since = self._stuck_since or now
        if now - self._stuck_since > PATIENCE_S:
            self.close(error)

    def close(self, error: Exception) -> None:
        """Refuse them all."""
        for ref in list(self._waiting):
            self._drop(ref).answered(error)

    def _answered(self, reply: dict[int, Submitted] | Exception) -> None:
        batch, self._in_the_air = self._in_the_air, []
        if isinstance(reply, BrokerUnavailableError):  # idempotent by ref: sent again after the reconnect
            made = [self._hub.pending[patient.ref].since for patient in batch if patient.ref in self._hub.pending]
            self._hub.drops.may_be_sent_twice(max(made, default=0.0))
            if self._hub.lines.is_connected:
                self._wait(RETRY_S)
            return
        self._stuck_since = None
        if isinstance(reply, Exception):
            self._let_go(batch, reply)
        else:
            refused = [patient for i, patient in enumerate(batch) if reply.get(i) is Submitted.FULL]
            for i, patient in enumerate(batch):
                if (answer := reply.get(i, Submitted.NEW)) is not Submitted.FULL:
                    self._let_go([patient], answer)
            if refused:
                first, last = PAUSE_S
                has_moved = len(refused) < len(batch)
                self._pause_s = first if has_moved else min(last, max(first, 2 * self._pause_s))
                self._wait(self._pause_s)
                return
            self._pause_s = 0.0
        self.send()

    def _let_go(self, patients: list[Patient], answer: Answer) -> None:
        for patient in patients:
            if patient.ref in self._waiting:
                self._drop(patient.ref)
            patient.answered(answer)

    def _drop(self, ref: bytes) -> Patient:
        patient = self._waiting.pop(ref)
        self.size_bytes -= patient.size_bytes
        return patient

    def _first(self) -> list[Patient]:
        """The next batch; those whose callers have heard of an end meanwhile drop out."""
        batch: list[Patient] = []
        while self._waiting and not batch:
            for patient in list(itertools.islice(self._waiting.values(), AT_ONCE)):
                if patient.is_adopted or patient.ref in self._hub.pending:
                    batch.append(patient)
                else:
                    self._drop(patient.ref)
        return batch

    def _wait(self, pause_s: float) -> None:
        self._pause = self._hub.loop.call_later(pause_s, self._go_on)

    def _go_on(self) -> None:
        self._pause = None
        self.send()
