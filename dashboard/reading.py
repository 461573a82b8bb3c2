"""One look at everything the dashboard shows. Reads only: not even the record of a node long gone is swept from here."""

import time
from dataclasses import dataclass
from typing import Any

from millstream.broker.connection import Control, ping
from millstream.broker.records import AppRecord, DeploymentView, NodeRecord
from millstream.broker.registry import Registry
from millstream.config import Settings


@dataclass(frozen=True, slots=True)
class Look:
    """What one poll read."""

    at_ms: int  # the server's clock
    took_s: float
    info: dict[str, Any]  # the server's INFO
    apps: dict[str, AppRecord]
    views: list[DeploymentView]
    dead: dict[str, int]  # tag -> dead letters
    nodes: list[NodeRecord]
    alive: frozenset[str]  # the nodes that hold their lease
    leader: str | None  # "<autoscaler> <fence>"


async def look(client: Control, settings: Settings) -> Look:
    """Read it all. Raises BrokerUnavailableError, SignatureError (with another secret nothing can be read), or what redis-py
    raises."""
    started = time.perf_counter()
    await ping(client, settings)
    registry = Registry(client, settings)
    await registry.check_secret(only_look=True)
    apps = await registry.apps()
    views = await registry.views()
    nodes = list((await registry.known_nodes()).values())  # `nodes` would also remove the dead ones
    leader = await registry.client.get(registry.keys.leader)
    return Look(
        at_ms=await registry.now_ms(),
        took_s=time.perf_counter() - started,
        info=await registry.client.info(),
        apps=apps,
        views=views,
        dead={view.tag: await registry.dead_count(view.tag) for view in views},
        nodes=nodes,
        alive=frozenset([n.node for n in nodes if await registry.client.exists(registry.keys.node_lease(n.node))]),
        leader=leader.decode() if leader else None,
    )
