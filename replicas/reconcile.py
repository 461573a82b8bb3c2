"""What a node should start and drain, given what it should run and what it runs. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Running:
    """One replica process as the launcher sees it."""

    replica: str
    tag: str
    version: str
    is_ready: bool
    is_draining: bool
    ongoing: int = 0


@dataclass(frozen=True, slots=True)
class Actions:
    start: dict[tuple[str, str], int] = field(default_factory=dict)  # (tag, version) -> how many
    drain: list[str] = field(default_factory=list)


def reconcile(plan: Mapping[str, tuple[int, str]], running: Iterable[Running]) -> Actions:
    """`plan`: tag -> (replicas, version). Draining replicas count for nothing.

    A new version starts in full before the old one leaves: an old replica drains for each new one that is ready.
    """
    by_tag: dict[str, list[Running]] = {tag: [] for tag in plan}
    for one in running:
        if not one.is_draining:
            by_tag.setdefault(one.tag, []).append(one)
    start: dict[tuple[str, str], int] = {}
    drain: list[str] = []
    for tag, replicas in by_tag.items():
        wanted, version = plan.get(tag, (0, ""))
        new = [r for r in replicas if r.version == version]
        old = [r for r in replicas if r.version != version]
        if wanted > len(new):
            start[tag, version] = wanted - len(new)
        drain += [r.replica for r in _least_useful(new)[: max(0, len(new) - wanted)]]
        ready = min(wanted, sum(r.is_ready for r in new))
        drain += [r.replica for r in _least_useful(old)[: max(0, len(old) + ready - wanted)]]
    return Actions(start, drain)


def _least_useful(replicas: list[Running]) -> list[Running]:
    """Those to drain first: not ready yet, then idle, then the least busy."""
    return sorted(replicas, key=lambda r: (r.is_ready, r.ongoing, r.replica))
