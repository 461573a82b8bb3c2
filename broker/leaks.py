"""Keys that nothing owns and nothing will end: there should be none. For `millstream doctor`.

Every key has a TTL, or belongs to the installation, to a node, to a deployment that exists, or to an open request.
"""

from dataclasses import dataclass, field

from millstream.broker.keys import DeploymentKeys
from millstream.broker.registry import Registry

MOST_KEYS = 200_000  # to look at: what is lost shows among them
AT_ONCE = 1000
NO_TTL = -1


@dataclass(slots=True)
class Leaks:
    """`keys` are without owner and end. Not `is_complete`: there were more keys than were looked at."""

    looked_at: int = 0
    is_complete: bool = True
    keys: list[str] = field(default_factory=list)


async def find_leaks(registry: Registry, most: int = MOST_KEYS) -> Leaks:
    """Look through this installation's keys. What comes and goes meanwhile is no leak: suspects are looked at twice."""
    found, batch = Leaks(), list[str]()
    namespace = registry.settings.namespace
    for pattern in (f"{namespace}:*", f"{{{namespace}:*"):
        async for key in registry.client.scan_iter(match=pattern, count=AT_ONCE):
            if found.looked_at == most:
                found.is_complete = False
                break
            found.looked_at += 1
            batch.append(key.decode(errors="replace"))
            if len(batch) == AT_ONCE:
                found.keys += await _without_owner(registry, batch)
                batch = []
    found.keys += await _without_owner(registry, batch)
    found.keys = await _without_owner(registry, found.keys)
    return found


async def _without_owner(registry: Registry, names: list[str]) -> list[str]:
    if not names:
        return []
    async with registry.client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.pttl(name)
        ttls_ms = await pipe.execute()
    suspects = [name for name, ttl_ms in zip(names, ttls_ms, strict=True) if ttl_ms == NO_TTL]
    return [name for name in suspects if not await _has_owner(registry, name)]


async def _has_owner(registry: Registry, name: str) -> bool:
    keys, client = registry.keys, registry.client
    if name in (keys.apps, keys.nodes, keys.fence, keys.changes, keys.secret_check):
        return True
    if not name.startswith("{"):
        prefix, suffix = keys.node_plan("\n").split("\n")
        node = name.removeprefix(prefix).removesuffix(suffix)
        return name == keys.node_plan(node) and bool(await client.hexists(keys.nodes, node))
    tag = name[len(registry.settings.namespace) + 2 :].partition("}")[0]
    own: DeploymentKeys = registry.keys_of(tag)
    if not await client.exists(own.config):
        return False
    if name in own.owned:
        return True
    for prefix in (own.supplied_prefix, own.payload_prefix):
        if name.startswith(prefix):
            return bool(await client.hexists(own.open, name.removeprefix(prefix)))
    return False
