"""What is in the server when all is over: the outcome of every ref in the ledger, and what should not be there any more."""

import time
from collections.abc import Iterable
from typing import Any

from chaos.judge import Stored
from millstream.broker import outcomes
from millstream.broker.codec import codec_for
from millstream.broker.keys import GROUP, split_ref
from millstream.broker.registry import Registry
from millstream.errors import MillstreamError
from millstream.handles import engines

TAGS = ("default.Work", "default.Threads")
AT_ONCE = 500
SETTLES_WITHIN_S = 30.0  # requests whose clients were killed may still run


async def settle(registry: Registry) -> list[str]:
    """Wait until no request is open; what is left in the end, in words."""
    import anyio

    give_up = time.monotonic() + SETTLES_WITHIN_S
    while (left := await _left(registry)) and time.monotonic() < give_up:  # noqa: ASYNC110 - it is others that work
        await anyio.sleep(0.2)
    return left


async def _left(registry: Registry) -> list[str]:
    client, left = registry.client, list[str]()
    for tag in TAGS:
        keys = registry.keys_of(tag)
        for name, key in (("open", keys.open), ("held", keys.held), ("notes", keys.notes)):
            if fields := await client.hkeys(key):
                left.append(f"{tag}: {len(fields)} in {name!r}, such as {fields[0].decode()}")
        for lane in keys.lanes:
            entries, pending = await client.xlen(lane), await client.xpending(lane, GROUP)
            if entries or pending["pending"]:
                left.append(f"{lane}: {entries} entries, {pending['pending']} pending")
        for name, key in (("parked", keys.parked), ("due", keys.due)):
            if count := await client.zcard(key):
                left.append(f"{tag}: {count} in {name!r}")
        if count := await client.xlen(keys.dead):
            left.append(f"{tag}: {count} dead letters")
    return left


async def stored(registry: Registry, ref_ids: Iterable[str]) -> dict[str, Stored]:
    """By ref id."""
    ids, found = sorted(ref_ids), dict[str, Stored]()
    for start in range(0, len(ids), AT_ONCE):
        some = ids[start : start + AT_ONCE]
        places = [split_ref(ref_id) for ref_id in some]
        results = await registry.client.mget([registry.keys_of(tag).result(ref) for tag, ref in places])
        found.update((ref_id, _read(ref_id, result)) for ref_id, result in zip(some, results, strict=True) if result)
    return found


def _read(ref_id: str, result: bytes) -> Stored:
    tag, ref = split_ref(ref_id)
    settings = engines.settings()
    codec = codec_for(settings.secret_key, settings.namespace, tag)
    state = result.split(b" ", 1)[0].decode()
    try:
        value: Any = outcomes.open_stored(codec, ref.encode(), result)
    except MillstreamError:
        return Stored(state)
    return Stored(state, value[0][1] if isinstance(value[0], tuple) else value[1])
