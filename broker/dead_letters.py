"""Requests whose attempts are used up: looked at, sent again, dropped. For operators.

They lie in a stream per deployment, at most 10,000 of them and for a week (`lua/dead.lua`).
"""

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis.exceptions

from millstream.broker import scripts
from millstream.broker.connection import run
from millstream.broker.keys import split_ref
from millstream.broker.outcomes import no_such_deployment, read_history
from millstream.broker.registry import Registry
from millstream.broker.scripts import Requeued

AT_ONCE = 100  # letters per script call, and per read


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One request that was given up. `id` is "<tag>/<entry id>"; `ref_id` is empty if it is no request at all."""

    id: str
    ref_id: str
    method: str
    lane: str
    died_ms: int  # on the server's clock
    attempt: int
    size_bytes: int  # of its signed arguments; -1 where they are large and lie in a key of their own
    history: list[dict[str, Any]] = field(default_factory=list)  # attempts that failed: replica, cause, at_ms, attempt

    @property
    def reason(self) -> str:
        return str(self.history[-1]["cause"]) if self.history else "it is no request: it has no ref"


async def letters(registry: Registry, tag: str) -> AsyncIterator[DeadLetter]:
    """All dead letters of a deployment, the latest first, as they are read."""
    end = "+"
    while rows := await registry.client.xrevrange(registry.keys_of(tag).dead, max=end, count=AT_ONCE):
        for entry, fields in rows:
            yield _read(tag, entry.decode(), fields)
        end = f"({rows[-1][0].decode()}"


async def find(registry: Registry, name: str) -> DeadLetter | None:
    """A dead letter by its own id, or by its ref id (then the latest of that). ValueError if that is neither."""
    tag, slash, entry = name.partition("/")
    if slash:
        return await _by_entry(registry, tag, entry)
    tag, _ = split_ref(name)
    async for letter in letters(registry, tag):
        if letter.ref_id == name:
            return letter
    return None


async def requeue(registry: Registry, found: Iterable[DeadLetter]) -> dict[str, Requeued]:
    """Send them again: the same ref id and arguments, attempts from 1, no deadline. What was done about each, by its id.

    Raises DeploymentNotFoundError if theirs is just being deleted.
    """
    done: dict[str, Requeued] = {}
    for tag, entries in _by_tag(found).items():
        for some in _in_batches(entries):
            try:
                answers = await run(registry.client, scripts.requeue(registry.keys_of(tag), some))
            except redis.exceptions.ResponseError as e:
                raise (no_such_deployment(tag) if "NODEPLOYMENT" in str(e) else e) from None
            done |= {f"{tag}/{entry}": answer for entry, answer in zip(some, answers, strict=True)}
    return done


async def drop(registry: Registry, found: Iterable[DeadLetter]) -> int:
    """Forget them, arguments included; how many there still were."""
    count = 0
    for tag, entries in _by_tag(found).items():
        for some in _in_batches(entries):
            count += await run(registry.client, scripts.drop(registry.keys_of(tag), some))
    return count


async def _by_entry(registry: Registry, tag: str, entry: str) -> DeadLetter | None:
    ms, _, sequence = entry.partition("-")
    if not (ms.isdecimal() and sequence.isdecimal()):
        raise ValueError(f"{tag}/{entry} is no id of a dead letter; one looks like 'app.deployment/1700000000000-0'")
    rows = await registry.client.xrange(registry.keys_of(tag).dead, entry, entry)
    return _read(tag, entry, rows[0][1]) if rows else None


def _in_batches(entries: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(entries), AT_ONCE):
        yield entries[start : start + AT_ONCE]


def _by_tag(found: Iterable[DeadLetter]) -> dict[str, Sequence[str]]:
    entries: dict[str, list[str]] = {}
    for letter in found:
        tag, _, entry = letter.id.partition("/")
        entries.setdefault(tag, []).append(entry)
    return dict(entries)


def _read(tag: str, entry: str, fields: dict[bytes, bytes]) -> DeadLetter:
    ref, attempt = fields.get(b"ref", b"").decode(errors="replace"), fields.get(b"attempt", b"1")[:9]
    return DeadLetter(
        id=f"{tag}/{entry}",
        ref_id=f"{tag}~{ref}" if ref else "",
        method=fields.get(b"method", b"").decode(errors="replace"),
        lane=fields.get(b"lane", b"").decode(errors="replace"),
        died_ms=int(entry.partition("-")[0]),
        attempt=int(attempt) if attempt.isdigit() else 1,
        size_bytes=-1 if b"payload" in fields else len(fields.get(b"body", b"")),
        history=read_history(fields.get(b"history", b"[]")),
    )
