"""What a test may not leave behind: keys without an end, and requests without a place.

`take_snapshot` reads a server, `find_leaks` and `find_lost` judge what was read; they do no I/O.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from millstream.broker.keys import DeploymentKeys, Keys

_DEPLOYMENT_KEY = re.compile(r"\{([^:}]+):([^}]+)\}:")
NO_TTL = -1


@dataclass(frozen=True, slots=True)
class Requests:
    """What one deployment's keys say about its requests."""

    open: Mapping[str, str] = field(default_factory=dict)  # ref -> "<lane> <entry id>", "parked" or "delayed"
    entries: Mapping[str, str] = field(default_factory=dict)  # "<lane> <entry id>" -> ref
    parked: frozenset[str] = frozenset()
    delayed: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    ended: frozenset[str] = frozenset()
    noted: frozenset[str] = frozenset()
    timed: frozenset[str] = frozenset()  # with a deadline
    holding: frozenset[str] = frozenset()  # large values of others


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One reading of a server."""

    ttls_ms: Mapping[str, int]  # every key -> what is left of it; NO_TTL where it has no end
    requests: Mapping[DeploymentKeys, Requests] = field(default_factory=dict)
    nodes: Mapping[str, frozenset[str]] = field(default_factory=dict)  # namespace -> its nodes


def find_leaks(snapshot: Snapshot) -> list[str]:
    """Keys without TTL that are neither permanent nor owned by a node or deployment that still exists."""
    permitted = _permanent(snapshot) | _owned_by_nodes(snapshot) | _owned_by_deployments(snapshot)
    return sorted(key for key, ttl_ms in snapshot.ttls_ms.items() if ttl_ms == NO_TTL and key not in permitted)


def _permanent(snapshot: Snapshot) -> set[str]:
    permanent: set[str] = set()
    for namespace in {key.lstrip("{").partition(":")[0] for key in snapshot.ttls_ms}:
        keys = Keys(namespace)
        permanent |= {keys.apps, keys.nodes, keys.fence, keys.changes, keys.secret_check}
    return permanent


def _owned_by_nodes(snapshot: Snapshot) -> set[str]:
    return {Keys(namespace).node_plan(node) for namespace, nodes in snapshot.nodes.items() for node in nodes}


def _owned_by_deployments(snapshot: Snapshot) -> set[str]:
    owned: set[str] = set()
    for keys, requests in snapshot.requests.items():
        if keys.config in snapshot.ttls_ms:
            owned |= {*keys.owned, *(key(ref) for ref in requests.open for key in (keys.supplied, keys.payload))}
    return owned


def find_lost(snapshot: Snapshot) -> list[str]:
    """Every request that is not in exactly one place, and whatever speaks of a request that has ended."""
    return [f"{keys.tag}: {what}" for keys, requests in snapshot.requests.items() for what in _contradictions(requests)]


def _contradictions(requests: Requests) -> list[str]:
    found = []
    for ref, place in requests.open.items():
        if not _is_at(requests, ref, place):
            found.append(f"request {ref} is open at {place!r}, and nothing is there")
        if ref in requests.ended:
            found.append(f"request {ref} is open and has a result")
    for place, ref in requests.entries.items():
        if requests.open.get(ref) != place:
            found.append(f"entry {place!r} is of request {ref}, which is open at {requests.open.get(ref)!r}")
    for name in ("parked", "delayed", "held", "noted", "timed", "holding"):
        found += [
            f"request {ref} is in {name!r} and not open" for ref in getattr(requests, name) - requests.open.keys()
        ]
    return found


def _is_at(requests: Requests, ref: str, place: str) -> bool:
    match place:
        case "parked":
            return ref in requests.parked and ref in requests.held
        case "delayed":
            return ref in requests.delayed and ref in requests.held
        case _:
            return requests.entries.get(place) == ref


def take_snapshot(client: Any) -> Snapshot:
    """Read all of a server, through a blocking client."""
    names = sorted(key.decode() for key in client.scan_iter(count=1000))
    found = {match.groups() for match in map(_DEPLOYMENT_KEY.match, names) if match}
    return Snapshot(
        ttls_ms=_read_ttls(client, names),
        requests={
            DeploymentKeys(namespace, tag): _read_requests(client, DeploymentKeys(namespace, tag), names)
            for namespace, tag in sorted(found)
        },
        nodes={
            name.removesuffix(":nodes"): frozenset(node.decode() for node in client.hkeys(name))
            for name in names
            if name.endswith(":nodes")
        },
    )


def _read_ttls(client: Any, names: list[str]) -> dict[str, int]:
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.pttl(name)
        return dict(zip(names, pipe.execute(), strict=True))


def _read_requests(client: Any, keys: DeploymentKeys, names: list[str]) -> Requests:
    def tails(prefix: str) -> frozenset[str]:
        return frozenset(name.removeprefix(prefix) for name in names if name.startswith(prefix))

    def members(key: str) -> frozenset[str]:
        return frozenset(ref.decode() for ref in client.zrange(key, 0, -1))

    return Requests(
        open={ref.decode(): place.decode() for ref, place in client.hgetall(keys.open).items()},
        entries={
            f"{key.removeprefix(keys.prefix)} {entry.decode()}": fields[b"ref"].decode()
            for key in keys.lanes
            for entry, fields in client.xrange(key)
        },
        parked=members(keys.parked),
        delayed=members(keys.due),
        held=frozenset(ref.decode() for ref in client.hkeys(keys.held)),
        ended=tails(keys.result_prefix),
        noted=frozenset(name.decode().rpartition(":")[0] for name in client.hkeys(keys.notes)),
        timed=members(keys.deadlines),
        holding=frozenset(ref.decode() for ref in client.hkeys(keys.holds)),
    )
