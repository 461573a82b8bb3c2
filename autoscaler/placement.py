"""How a deployment's replicas are spread over nodes. Pure."""

from collections.abc import Mapping, Sequence


def place(target: int, nodes: Sequence[str], now: Mapping[str, int], load: Mapping[str, int]) -> dict[str, int]:
    """Replicas per node: as now where possible, growing on the node with the least `load`, shrinking on that with the most.

    `now` may name nodes that are gone; their share is placed anew. Without nodes nothing is placed.
    """
    if not nodes:
        return {}
    placed = {node: now.get(node, 0) for node in nodes}
    loads = {node: load.get(node, 0) for node in nodes}
    while sum(placed.values()) < target:
        node = min(nodes, key=lambda n: (loads[n], n))
        placed[node] += 1
        loads[node] += 1
    while sum(placed.values()) > target:
        node = max((n for n in nodes if placed[n]), key=lambda n: (loads[n], n))
        placed[node] -= 1
        loads[node] -= 1
    return placed
