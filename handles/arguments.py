"""What becomes of the arguments of a call: refs at the top level are replaced by their values before the method runs,
refs further down stay refs, un-awaited tasks become refs at any depth (Ray's rules)."""

import asyncio
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

from millstream.broker import pickling
from millstream.broker.pickling import Pickled
from millstream.errors import SerializationError
from millstream.handles.generics import A, T_co
from millstream.handles.ref import ObjectRef


class RefTask(asyncio.Task[ObjectRef[T_co]]):
    """What `DeploymentHandle.remote` returns: a task whose result is the ref, which is known before it is done."""

    ref: ObjectRef[T_co]
    is_argument = False  # another request needs it

    def cancel(self, msg: Any = None) -> bool:
        """Before the match this cancels the request, as in Ray; later it does nothing.

        The end of an event loop cancels all tasks, when it has stopped: what is an argument of another request goes on.
        """
        goes_on = self.done() or (self.is_argument and not self.get_loop().is_running())
        if not goes_on:  # here and not in its coroutine, which may not have begun
            self.ref.cancel_unmatched()
        return super().cancel(msg)

    async def _to_object_ref(self) -> ObjectRef:
        return await self  # Ray's way from a response to the ref of its value

    def _to_object_ref_sync(self) -> ObjectRef:
        return self.ref


Argument: TypeAlias = A | ObjectRef[A] | RefTask[A]  # what may stand for an argument of type A


class Later(NamedTuple):
    """Stands in a pickled argument list for the value of a ref, which the replica puts in."""

    ref_id: str


class Arguments(NamedTuple):
    """The pickled arguments of one call (in parts, if large), the refs whose values it needs, and those of un-awaited
    tasks further down."""

    body: bytes | Pickled
    depends_on: list[ObjectRef]
    mentions: list[ObjectRef]

    def snapshot(self) -> "Arguments":
        """For a caller that goes on before they are sent, and may change its arrays."""
        return self if isinstance(self.body, bytes) else self._replace(body=self.body.snapshot())


_WAITED_FOR = (ObjectRef, asyncio.Future)


def encode_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes | None:
    """The pickled arguments, of any length, of a call that takes nothing special, as most do; else None, and `encode` does it."""
    for value in args:
        if isinstance(value, _WAITED_FOR):
            return None
    for value in kwargs.values() if kwargs else ():
        if isinstance(value, _WAITED_FOR):
            return None
    return pickling.dump_plain((args, kwargs))


def encode_rows(rows: Iterable[tuple[Any, ...]]) -> list[bytes | None]:
    """As `encode_plain`, of many calls without keywords; None also for what is large."""
    dumps, most, special = pickling.dump_plain, pickling.LARGE_BYTES, _WAITED_FOR
    bodies: list[bytes | None] = []
    for row in rows:
        for value in row:
            if isinstance(value, special):
                bodies.append(None)
                break
        else:
            body = dumps((row, {}))
            bodies.append(body if body is not None and len(body) <= most else None)
    return bodies


def encode(what: str, args: tuple[Any, ...], kwargs: dict[str, Any], model_id: str = "") -> Arguments:
    """Pickle the arguments of a call to `what`, and the id of the model it is for. SerializationError, PayloadTooLargeError."""
    depends_on: list[ObjectRef] = []
    mentions: list[ObjectRef] = []
    tasks: list[RefTask] = []

    def later(value: Any) -> Any:
        ref = _task_to_ref(value, tasks)
        if isinstance(ref, ObjectRef):
            depends_on.append(ref)
            return Later(ref.id)
        return value

    def replace(value: Any) -> Any:
        ref = _task_to_ref(value, tasks)
        if ref is not value:
            mentions.append(ref)
        return ref

    for value in args:
        if isinstance(value, _WAITED_FOR):
            args = tuple(later(value) for value in args)
            break
    if kwargs:
        for value in kwargs.values():
            if isinstance(value, _WAITED_FOR):
                kwargs = {name: later(value) for name, value in kwargs.items()}
                break
    call = (args, kwargs, model_id) if model_id else (args, kwargs)
    body = pickling.dump_parts(call, what, replace)
    for task in tasks:
        task.is_argument = True
        task.add_done_callback(_note_failure)
    return Arguments(body, depends_on, mentions)


def _task_to_ref(value: Any, tasks: list[RefTask]) -> Any:
    if isinstance(value, RefTask):
        tasks.append(value)
        return value.ref
    if isinstance(value, asyncio.Future):
        raise SerializationError(
            f"{value!r} cannot be an argument: only the tasks that handle.remote() returns become refs; await it first"
        )
    return value


def _note_failure(task: asyncio.Future[Any]) -> None:
    """The failure of an upstream reaches its caller through the dependant: asyncio must not call it forgotten."""
    if not task.cancelled():
        task.exception()


def fill_in(
    args: tuple[Any, ...], kwargs: dict[str, Any], values: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The replica's half: put values in where a ref stood."""
    return (
        tuple(values[a.ref_id] if isinstance(a, Later) else a for a in args),
        {name: values[a.ref_id] if isinstance(a, Later) else a for name, a in kwargs.items()},
    )
