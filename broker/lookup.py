"""What became of one request, read from outside without touching it: for the CLI, and whoever else looks."""

from dataclasses import dataclass, field
from typing import Any

from millstream.broker.held import HeldRequest
from millstream.broker.keys import GROUP, LANES, DeploymentKeys, split_ref
from millstream.broker.outcomes import large_part, read_history
from millstream.broker.registry import Registry
from millstream.broker.states import State

LOOKS = 5  # a request may move on between two reads; one that does so five times over is alive and well
HEADER_BYTES = 200  # more than "<state> <lane> <entry id>\n" ever has


@dataclass(frozen=True, slots=True)
class RequestView:
    """One request as it is in Redis now. What does not apply to its state is None or empty."""

    ref_id: str
    state: State
    lane: str = ""
    entry: str = ""
    method: str = ""
    since_s: float | None = None  # how long it has been running, or queued
    replica: str = ""  # that runs it
    attempt: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)  # attempts that ended with a death, and why
    waits_for: list[str] = field(default_factory=list)  # ref ids
    due_in_s: float | None = None
    size_bytes: int | None = None  # of what is stored as its result
    expires_in_s: float | None = None


async def view_request(registry: Registry, ref_id: str) -> RequestView | None:
    """Where a request is; None if its ref is unknown or its result has expired. ValueError if that is no ref id."""
    tag, ref = split_ref(ref_id)
    keys = registry.keys_of(tag)
    for _ in range(LOOKS):
        place, header, size, ttl_ms = await _where(registry, keys, ref)
        if header:
            return await _ended(registry, keys, ref_id, header, size, ttl_ms)
        if place is None:
            return None
        lane, _, entry = place.partition(" ")
        view = await _in_lane(registry, keys, ref_id, lane, entry) if entry else await _held(registry, keys, ref_id)
        if view is not None:
            return view
    return RequestView(ref_id, State.QUEUED)


async def read_stored(registry: Registry, ref_id: str) -> bytes:
    """What is stored as the result of an ended request, for `outcomes.open_stored`. Empty if it has expired."""
    tag, ref = split_ref(ref_id)
    stored: bytes | None = await registry.client.get(registry.keys_of(tag).result(ref))
    return stored or b""


async def orphans(registry: Registry, tag: str) -> dict[str, int]:
    """Consumers without a lease that hold requests of a deployment, and how many: replicas that nobody has buried yet."""
    keys, held = registry.keys_of(tag), dict[str, int]()
    async with registry.client.pipeline(transaction=False) as pipe:
        for lane in keys.lanes:
            pipe.xinfo_consumers(lane, GROUP)
        lanes = await pipe.execute(raise_on_error=False)
    for consumers in lanes:
        for consumer in consumers if isinstance(consumers, list) else ():  # an error: no such lane or group yet
            name = consumer["name"].decode()
            if consumer["pending"] and not await registry.client.exists(keys.lease(name)):
                held[name] = held.get(name, 0) + consumer["pending"]
    return held


async def _where(registry: Registry, keys: DeploymentKeys, ref: str) -> tuple[str | None, str, int, int]:
    async with registry.client.pipeline(transaction=True) as pipe:
        pipe.hget(keys.open, ref)
        pipe.getrange(keys.result(ref), 0, HEADER_BYTES)
        pipe.strlen(keys.result(ref))
        pipe.pttl(keys.result(ref))
        place, start, size, ttl_ms = await pipe.execute()
    header, _, body = start.partition(b"\n")
    size = size - len(header) - 1 if large_part(start) is None else int(body[1:])
    return (place.decode() if place else None), header.decode(errors="replace"), size, ttl_ms


async def _ended(
    registry: Registry, keys: DeploymentKeys, ref_id: str, header: str, size: int, ttl_ms: int
) -> RequestView:
    state, _, rest = header.partition(" ")
    lane, _, entry = rest.partition(" ")
    history = []
    if state == State.DEAD:
        stored = await read_stored(registry, ref_id)
        history = read_history(stored.partition(b"\n")[2])
    return RequestView(
        ref_id,
        State(state),
        lane=lane if lane in LANES else "",
        entry=entry if lane in LANES else "",
        attempt=history[-1]["attempt"] if history else None,
        history=history,
        size_bytes=size,
        expires_in_s=ttl_ms / 1000 if ttl_ms >= 0 else None,
    )


async def _in_lane(registry: Registry, keys: DeploymentKeys, ref_id: str, lane: str, entry: str) -> RequestView | None:
    """Queued or running; None if it has just left this place."""
    async with registry.client.pipeline(transaction=True) as pipe:
        pipe.xrange(keys.lane(lane), entry, entry)
        pipe.xpending_range(keys.lane(lane), GROUP, min=entry, max=entry, count=1)
        rows, pending = await pipe.execute(raise_on_error=False)
    if not isinstance(rows, list) or not rows:
        return None
    fields = {name.decode(): value for name, value in rows[0][1].items()}
    history = read_history(fields.get("history", b"[]"))
    taken = pending[0] if isinstance(pending, list) and pending else None  # an error: the lane has no group yet
    queued_s = (await registry.now_ms() - int(entry.partition("-")[0])) / 1000
    return RequestView(
        ref_id,
        State.RUNNING if taken else State.QUEUED,
        lane=lane,
        entry=entry,
        method=fields.get("method", b"").decode(),
        since_s=taken["time_since_delivered"] / 1000 if taken else queued_s,
        replica=taken["consumer"].decode() if taken else "",
        attempt=int(fields.get("attempt", b"1")),
        history=history,
    )


async def _held(registry: Registry, keys: DeploymentKeys, ref_id: str) -> RequestView | None:
    """Parked or delayed; None if it has just been promoted."""
    ref = split_ref(ref_id)[1]
    async with registry.client.pipeline(transaction=True) as pipe:
        pipe.hget(keys.open, ref)
        pipe.hget(keys.held, ref)
        pipe.hgetall(keys.supplied(ref))
        place, packed, supplied = await pipe.execute()
    if packed is None:
        return None
    held = HeldRequest.read(packed)
    missing = [] if place != b"parked" or held.waits in ("-", "*") else [held.waits]
    missing += [name[4:].decode() for name, value in supplied.items() if name.startswith(b"dep:") and not value]
    return RequestView(
        ref_id,
        State.PARKED if missing else State.DELAYED,
        lane=held.lane,
        method=held.method,
        waits_for=missing,
        due_in_s=max(0.0, (held.due_ms - await registry.now_ms()) / 1000) if held.due_ms else None,
    )
