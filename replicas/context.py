"""Which replica code runs in: what `serve.get_replica_context()` answers.

Bound to the context of the replica's tasks, not to the process: several replicas can live in one process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from millstream.errors import MillstreamError


@dataclass(frozen=True, slots=True)
class ReplicaContext:
    """The replica that code runs in. Ray's names, without `rank` and `world_size`: replicas here are not numbered."""

    app_name: str
    deployment: str
    replica_tag: str  # unique among the replicas of the deployment, as in `serve.status()`
    node: str
    version: str  # of the application: each deploy makes a new one
    max_ongoing_requests: int
    servable_object: Any = field(default=None, compare=False, repr=False)  # None until the constructor has returned

    @property
    def replica_id(self) -> str:
        """The same as `replica_tag`. In Ray this is an object; here a replica has one name."""
        return self.replica_tag


class _Place:
    """Shared by all contexts that were copied within one replica, so what its constructor started sees the rest, too."""

    __slots__ = ("context",)

    def __init__(self, context: ReplicaContext) -> None:
        self.context = context


_place: ContextVar[_Place | None] = ContextVar("millstream_replica", default=None)


def get_replica_context() -> ReplicaContext:
    """The replica that this code runs in: its deployment, its name, and the object that it serves.

    For the constructor of a deployment (where `servable_object` is still None), its methods, sync ones included, and
    what they start with asyncio or `asyncio.to_thread`. A thread that you start yourself has it when you run it in
    `contextvars.copy_context()`. Raises MillstreamError outside of a replica.
    """
    found = find_replica_context()
    if found is None:
        raise MillstreamError(
            "serve.get_replica_context() was called outside of a replica; call it in the constructor or in a method of "
            "a deployment (a thread that you start there: run it in contextvars.copy_context())"
        )
    return found


def find_replica_context() -> ReplicaContext | None:
    """As `get_replica_context`; None outside of a replica."""
    place = _place.get()
    return None if place is None else place.context


@contextmanager
def inside(context: ReplicaContext) -> Iterator[None]:
    """What runs in here, and all tasks it starts, runs in this replica."""
    token = _place.set(_Place(context))
    try:
        yield
    finally:
        _place.reset(token)


def constructed(servable_object: Any) -> None:
    """From now on this is the replica's object, for all that runs in it. Outside of a replica: nothing."""
    place = _place.get()
    if place is not None:
        place.context = replace(place.context, servable_object=servable_object)
