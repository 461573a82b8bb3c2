"""Looks after what waits long: messages are hints, the record in Redis is the truth."""

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from millstream.broker.outcomes import deploy_failed
from millstream.broker.records import ReplicaRecord
from millstream.broker.signed import UNREADABLE, Signer
from millstream.handles.lines import Lines
from millstream.handles.route import Pending, Route

LOOK_AFTER_S = 2.0  # what has waited so long is looked up, oldest first
LOOK_AT_ONCE = 100  # per patrol and deployment


class Patrol:
    """One `step()` twice a second. `pending` is the engine's own table, in the order of submission."""

    def __init__(
        self,
        pending: dict[bytes, Pending],
        lines: Lines,
        signer: Signer,
        route: Callable[[str], Route],
        look_at: Callable[[Route, list[bytes]], None],
    ) -> None:
        self._pending, self._lines, self._route, self._look_at = pending, lines, route, look_at
        self._signer = signer
        self._to_look_at: deque[bytes] = deque()

    def step(self) -> None:
        """Look up what has waited long, oldest first, a bounded number each time; ask after deployments that may be stuck."""
        if not self._to_look_at:
            self._to_look_at = deque(self._pending)
        old = time.monotonic() - LOOK_AFTER_S
        by_tag: dict[str, list[bytes]] = {}
        for _ in range(min(LOOK_AT_ONCE, len(self._to_look_at))):
            pending = self._pending.get(self._to_look_at[0])
            if pending is not None and pending.since > old:
                break
            ref = self._to_look_at.popleft()
            if pending is not None:
                by_tag.setdefault(pending.codec.tag, []).append(ref)
        for tag, refs in by_tag.items():
            self._look_at(self._route(tag), refs)
        for tag in {pending.codec.tag for pending in itertools.islice(self._pending.values(), LOOK_AT_ONCE)}:
            self._ask_whether_it_can_start(self._route(tag))

    def _ask_whether_it_can_start(self, route: Route) -> None:
        """Fail who waits for a deployment that cannot start, unless replicas of its former version still serve."""
        commands = self._lines.commands

        def answered(status: Any) -> None:
            if isinstance(status, list) and status[0] == b"DEPLOY_FAILED" and commands is not None:
                commands.send(functools.partial(looked, status), "HGETALL", route.keys.replicas)

        def looked(status: list[bytes | None], replicas: Any) -> None:
            if isinstance(replicas, list) and not any(map(is_running, replicas[::2], replicas[1::2])):
                self._fail_all(route, *(text.decode(errors="replace") if text else "" for text in status[1:]))

        def is_running(name: bytes, record: bytes) -> bool:
            try:
                return self._signer.read(ReplicaRecord, record, route.tag, name.decode()).state == "RUNNING"
            except UNREADABLE:  # some other program wrote it
                return False

        if commands is not None:
            commands.send(answered, "HMGET", route.keys.status, "state", "message", "traceback")

    def _fail_all(self, route: Route, message: str, traceback: str) -> None:
        error = deploy_failed(route.tag, message, traceback)
        for pending in [p for p in self._pending.values() if p.codec.tag == route.tag]:
            self._pending.pop(pending.ref, None)
            pending.fail(error)
