"""What a node should start, drain and update, given what it should run and what it runs. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from millstream.broker.records import Planned

AT_ONCE = 5  # one in so many replicas of a deployment is updated at a time (Ray's share): the others go on


@dataclass(frozen=True, slots=True)
class Running:
    """One replica process as the launcher sees it."""

    replica: str
    tag: str
    version: str
    is_ready: bool
    is_draining: bool
    ongoing: int = 0
    heading: str = ""  # the revision of the config that it was told last, or started with
    is_updating: bool = False  # it was told, and has not answered yet
    is_spent: bool = False  # it cannot take the planned config over: to be replaced, as one of another version


@dataclass(frozen=True, slots=True)
class Actions:
    start: dict[tuple[str, str], int] = field(default_factory=dict)  # (tag, version) -> how many
    drain: list[str] = field(default_factory=list)
    update: list[str] = field(default_factory=list)


def reconcile(plan: Mapping[str, Planned], running: Iterable[Running]) -> Actions:
    """Draining replicas count for nothing.

    A new version starts in full before the old one leaves: an old replica drains for each new one that is ready. A new
    config of the same version goes to a share of the replicas at a time, and only while as many as wanted are ready.
    """
    by_tag: dict[str, list[Running]] = {tag: [] for tag in plan}
    for one in running:
        if not one.is_draining:
            by_tag.setdefault(one.tag, []).append(one)
    actions = Actions()
    for tag, replicas in by_tag.items():
        planned = plan.get(tag, Planned(0, ""))
        new = [r for r in replicas if r.version == planned.version and not r.is_spent]
        old = [r for r in replicas if r.version != planned.version or r.is_spent]
        if planned.replicas > len(new):
            actions.start[tag, planned.version] = planned.replicas - len(new)
        actions.drain.extend(r.replica for r in _least_useful(new)[: max(0, len(new) - planned.replicas)])
        ready = min(planned.replicas, sum(r.is_ready for r in new))
        actions.drain.extend(r.replica for r in _least_useful(old)[: max(0, len(old) + ready - planned.replicas)])
        actions.update.extend(_to_update(planned, [r for r in new if r.replica not in actions.drain]))
    return actions


def _to_update(planned: Planned, replicas: list[Running]) -> list[str]:
    """Those to be told the planned config: who is at an earlier one already, then the least busy, so many at a time."""
    ready = [r for r in replicas if r.is_ready]
    behind = [r for r in ready if r.heading != planned.revision]
    under_way = [r.replica for r in behind if r.is_updating]
    waiting = [r.replica for r in sorted(behind, key=lambda r: (r.ongoing, r.replica)) if not r.is_updating]
    if len(ready) < planned.replicas:
        return under_way
    at_once = max(1, len(ready) // AT_ONCE) - sum(r.is_updating for r in ready)
    return under_way + waiting[: max(0, at_once)]


def _least_useful(replicas: list[Running]) -> list[Running]:
    """Those to drain first: not ready yet, then idle, then the least busy."""
    return sorted(replicas, key=lambda r: (r.is_ready, r.ongoing, r.replica))
