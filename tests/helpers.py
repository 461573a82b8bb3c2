"""Seeding, reading and waiting, in the words of the project."""

import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import hiredis

from millstream.broker import scripts
from millstream.broker.cluster_control import ClusterControl
from millstream.broker.connection import Control, run
from millstream.broker.held import HeldRequest
from millstream.broker.keys import GROUP, DeploymentKeys
from millstream.broker.states import TERMINAL, State

CALLER = "caller"
REPLICA = "r-1"
BODY = b"a signed body"

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Claimed:
    """One attempt: an entry in some replica's pending list."""

    ref: str
    lane: str
    entry: bytes
    fields: dict[bytes, bytes]


async def wait_until(
    condition: Callable[[], Awaitable[bool]] | Callable[[], bool], timeout_s: float = 20.0, what: str = ""
) -> None:
    """Return as soon as `condition()` holds; fail the test if it does not within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        holds = condition()
        if not isinstance(holds, bool):
            holds = await holds
        if holds:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:g} s in vain for {what or condition}")
        await anyio.sleep(0.005)


async def node_of(client: Control, key: str) -> Control:
    """For what only the node of a key can be asked; without a cluster, the client itself."""
    return await client.node_of(key) if isinstance(client, ClusterControl) else client


async def nodes_of(client: Control) -> list[Control]:
    """A client of each primary, for what each knows of itself only. Without a cluster, the client itself."""
    return await client.nodes() if isinstance(client, ClusterControl) else [client]


def new_ref() -> str:
    """The part of a ref id after `~`: 22 characters, a new one each time."""
    return f"{next(_numbers):022d}"


async def deploy_config(
    client: Control, keys: DeploymentKeys, *, max_attempts: int = 3, result_ttl_s: float = 60, **more: int
) -> None:
    """What scripts need of a deployment: its config (`more`: max_queued, timeout_ms) and the groups on its lanes."""
    async with client.pipeline(transaction=False) as pipe:
        fields: Any = {"max_attempts": max_attempts, "result_ttl_s": result_ttl_s, **more}
        pipe.hset(keys.config, mapping=fields)
        for lane in keys.lanes:
            pipe.xgroup_create(lane, GROUP, id="0", mkstream=True)
        await pipe.execute()


def request(
    ref: str, *, lane: str = "normal", method: bytes = b"__call__", extras: str = "", body: bytes = BODY
) -> tuple[bytes, str, bytes, str, bytes]:
    """One request as `scripts.submit` takes it; a batch is the sum of such tuples."""
    return ref.encode(), lane, method, extras, body


def asking(**extras: Any) -> str:
    """What a caller asks of a request beyond the usual: want, timeout_ms, attempts, kill, stream, payload."""
    return json.dumps(extras)


async def seed_queued(
    client: Control,
    keys: DeploymentKeys,
    count: int = 1,
    *,
    lane: str = "normal",
    caller: str = CALLER,
    extras: str = "",
) -> list[str]:
    """Submit `count` requests to one lane; their refs, in order."""
    refs = [new_ref() for _ in range(count)]
    for start in range(0, count, 100):
        batch = [part for ref in refs[start : start + 100] for part in request(ref, lane=lane, extras=extras)]
        assert await run(client, scripts.submit(keys, caller, batch)) == {}
    return refs


async def claim(client: Control, keys: DeploymentKeys, free: int = 1, *, replica: str = REPLICA) -> list[Claimed]:
    """What a replica with so many free slots gets."""
    _, taken = await run(client, scripts.claim(keys, replica, free))
    return attempts_of(keys, taken)


def attempts_of(keys: DeploymentKeys, reply: list[Any]) -> list[Claimed]:
    """The reply of an XREADGROUP as attempts, in its order."""
    found = []
    for lane, entries in reply:
        for entry, flat in entries:
            fields = dict(zip(flat[::2], flat[1::2], strict=True))
            found.append(Claimed(fields[b"ref"].decode(), lane.decode().removeprefix(keys.prefix), entry, fields))
    return found


async def seed_running(
    client: Control,
    keys: DeploymentKeys,
    count: int = 1,
    *,
    lane: str = "normal",
    replica: str = REPLICA,
    caller: str = CALLER,
    extras: str = "",
) -> list[Claimed]:
    """As `seed_queued`, and `replica` takes them all. Expects empty lanes."""
    refs = await seed_queued(client, keys, count, lane=lane, caller=caller, extras=extras)
    claimed = await claim(client, keys, count, replica=replica)
    assert [one.ref for one in claimed] == refs
    return claimed


async def seed_parked(
    client: Control,
    keys: DeploymentKeys,
    *depends_on: str,
    lane: str = "normal",
    delay_ms: int = 0,
    caller: str = CALLER,
    extras: str = "",
) -> str:
    """A request that waits for `depends_on` (ref ids); its ref."""
    ref = new_ref()
    call = scripts.hold(
        keys,
        caller,
        ref.encode(),
        lane,
        b"__call__",
        BODY,
        extras=extras.encode(),
        delay_ms=delay_ms,
        depends_on=depends_on or ["up.Up~" + ref],
    )
    assert await run(client, call) == scripts.Submitted.NEW
    return ref


async def seed_delayed(
    client: Control,
    keys: DeploymentKeys,
    delay_ms: int = 3_600_000,
    *,
    lane: str = "normal",
    caller: str = CALLER,
    extras: str = "",
) -> str:
    """A request that is due later; its ref."""
    ref = new_ref()
    call = scripts.hold(keys, caller, ref.encode(), lane, b"__call__", BODY, extras=extras.encode(), delay_ms=delay_ms)
    assert await run(client, call) == scripts.Submitted.NEW
    return ref


async def finish(
    client: Control, keys: DeploymentKeys, *attempts: Claimed, state: str = "succeeded", value: bytes = b"a value",
    caller: str = CALLER, ttl_s: int = 60,
) -> tuple[dict[int, scripts.Finished], list[scripts.Waiter]]:  # fmt: skip
    """Finish attempts of one lane, all alike; what the script answers."""
    outcomes = [part for one in attempts for part in (one.entry, one.ref.encode(), caller, state, value)]
    return await run(client, scripts.finish(keys, attempts[0].lane, ttl_s, outcomes))


async def emit(
    client: Control,
    keys: DeploymentKeys,
    one: Claimed,
    first: int,
    *items: bytes,
    caller: str = CALLER,
    ttl_s: Any = 3600,
) -> tuple[bool, int]:
    """Items `first`, `first` + 1, ... of a streaming request that runs; without any, just ask."""
    place = f"{one.lane} {one.entry.decode()}"
    return await run(client, scripts.emit(keys, one.ref, place, caller.encode(), ttl_s, first, items))


async def cancel(client: Control, keys: DeploymentKeys, *refs: str, overdue: bool = False) -> list[scripts.Ended]:
    """Cancel requests, or have those past their deadline time out; what the script answers to each."""
    answers, _ = await run(client, scripts.cancel(keys, 60, "why not", refs, overdue=overdue))
    return [answer for answer, _ in answers]


async def age(client: Control, key: str, *refs: str) -> None:
    """Let the time of these refs in a sorted set (due, parked, deadlines) have come."""
    await client.zadd(key, dict.fromkeys(refs, 1), xx=True)


async def now_ms(client: Control) -> int:
    """The server's clock."""
    seconds, micros = await client.time()
    return int(seconds) * 1000 + int(micros) // 1000


async def read_result(client: Control, keys: DeploymentKeys, ref: str) -> tuple[str, bytes] | None:
    """(header, body) of a stored result."""
    stored: Any = await client.get(keys.result(ref))
    if stored is None:
        return None
    header, _, body = stored.partition(b"\n")
    return header.decode(), body


async def read_held(client: Control, keys: DeploymentKeys, ref: str) -> HeldRequest:
    packed: Any = await client.hget(keys.held, ref)
    held = HeldRequest.read(packed)
    assert held.packed() == packed
    return held


async def set_due(client: Control, keys: DeploymentKeys, ref: str, due_ms: int) -> None:
    """Of a held request: as if it had been asked for then."""
    held = await read_held(client, keys, ref)
    await client.hset(keys.held, ref, held._replace(due_ms=due_ms).packed())


async def read_state(client: Control, keys: DeploymentKeys, ref: str) -> State | None:
    """Where a request is, by all that the server holds about it. Fails the test if that contradicts itself."""
    place: Any = await client.hget(keys.open, ref)
    result = await read_result(client, keys, ref)
    is_held = bool(await client.hexists(keys.held, ref))
    if place is None:
        assert not is_held, f"{ref} is held and not open"
        return None if result is None else _terminal(result[0])
    assert result is None, f"{ref} is open at {place!r} and has the result {result!r}"
    if place in (b"parked", b"delayed"):
        assert is_held, f"{ref} is {place!r} and has no body"
        return State(place.decode())
    assert not is_held, f"{ref} is in a lane and still held"
    lane, entry = place.decode().split()
    assert await client.xrange(keys.lane(lane), entry, entry), f"{ref} is open at {place!r}, where nothing is"
    pending = await client.xpending_range(keys.lane(lane), GROUP, entry, entry, 1)
    return State.RUNNING if pending else State.QUEUED


def _terminal(header: str) -> State:
    state = State(header.split()[0])
    assert state in TERMINAL
    return state


async def read_states(client: Control, keys: DeploymentKeys, refs: Iterable[str]) -> list[State | None]:
    return [await read_state(client, keys, ref) for ref in refs]


async def read_everything(client: Control) -> dict[str, Any]:
    """All keys and what is in them, pending lists included: two of these are equal when nothing has changed."""
    names = sorted([key.decode() async for key in client.scan_iter(count=1000)])
    kinds = await _in_one_go(client, lambda pipe: [pipe.type(name) for name in names])
    streams = [name for name, kind in zip(names, kinds, strict=True) if kind == b"stream"]
    groups = await _in_one_go(client, lambda pipe: [pipe.xinfo_groups(name) for name in streams])
    grouped = [(name, group["name"]) for name, found in zip(streams, groups, strict=True) for group in found]
    contents = await _in_one_go(
        client, lambda pipe: [READERS[kind](pipe, name) for name, kind in zip(names, kinds, strict=True)]
    )
    pending = await _in_one_go(
        client, lambda pipe: [pipe.xpending_range(name, group, "-", "+", 10_000) for name, group in grouped]
    )
    owners = {
        f"{name} {group.decode()}": [(row["message_id"], row["consumer"]) for row in rows]
        for (name, group), rows in zip(grouped, pending, strict=True)
    }
    return dict(zip(names, contents, strict=True)) | owners


READERS: dict[bytes, Callable[[Any, str], Any]] = {
    b"string": lambda pipe, name: pipe.get(name),
    b"hash": lambda pipe, name: pipe.hgetall(name),
    b"zset": lambda pipe, name: pipe.zrange(name, 0, -1, withscores=True),
    b"stream": lambda pipe, name: pipe.xrange(name),
    b"list": lambda pipe, name: pipe.lrange(name, 0, -1),
}


async def _in_one_go(client: Control, queue: Callable[[Any], Any]) -> list[Any]:
    async with client.pipeline(transaction=False) as pipe:
        queue(pipe)
        return await pipe.execute()


class Inbox:
    """What one caller or replica is told on its channel. Open it with `open_inbox` or `open_orders`."""

    def __init__(self, client: Any, subscription: Any, channel: str) -> None:
        self._client, self._subscription, self._channel = client, subscription, channel

    async def take(self) -> dict[str, bytes]:
        """The next message: ref -> what is stored, as hiredis reads it."""
        reader = hiredis.Reader()
        reader.feed(await self.take_raw())
        flat = reader.gets()
        assert isinstance(flat, list) and not reader.has_data()
        return {ref.decode(): stored for ref, stored in zip(flat[::2], flat[1::2], strict=True)}

    async def is_empty(self) -> bool:
        """True if no message has come. Asked by sending one: whatever came before would be read first."""
        await self._client.execute_command("SPUBLISH", self._channel, b"nothing before this")
        return await self.take_raw() == b"nothing before this"

    async def take_raw(self) -> bytes:
        """The next message as it was sent."""
        message = await self._subscription.get_message(timeout=2.0)
        assert message is not None, f"nothing came on {self._channel}"
        data: bytes = message["data"]
        return data


def open_inbox(client: Control, keys: DeploymentKeys, caller: str = CALLER) -> AbstractAsyncContextManager[Inbox]:
    return _open(client, keys.reply(caller))


def open_orders(client: Control, keys: DeploymentKeys, replica: str = REPLICA) -> AbstractAsyncContextManager[Inbox]:
    return _open(client, keys.orders(replica))


@asynccontextmanager
async def _open(client: Control, channel: str) -> AsyncIterator[Inbox]:
    async with (await node_of(client, channel)).pubsub() as subscription:
        await subscription.ssubscribe(channel)
        assert await subscription.get_message(timeout=2.0)  # that it is subscribed
        yield Inbox(client, subscription, channel)
