"""A user's exception on its way from the replica to the caller.

It arrives as an instance of both `TaskError` and its own class, with the remote traceback as text. Where it cannot be
pickled or loaded, its class and what of it can are put together again, without its constructor; where its class cannot
be imported or combined, it is a plain `TaskError` that names it. Errors of millstream arrive as they are.
"""

import contextlib
import pickle
from functools import lru_cache
from types import MemberDescriptorType
from typing import Any

from millstream.broker import pickling
from millstream.broker.tracebacks import shortened, user_traceback
from millstream.errors import MillstreamError, TaskError

MOST_BYTES = 1024 * 1024  # of a pickled exception: it goes through a script. A larger one loses its large parts
MOST_SHORT = 200
MOST_PART_BYTES = 64 * 1024
MOST_LINKS = 10  # of a chain of causes
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class made by a `class` statement, not one of C's


def capture(error: BaseException, *, where: str = "", request: str = "") -> bytes:
    """The pickled record of an exception. `where` names the replica and `request` the request it was raised in."""
    if isinstance(error, TaskError):
        record = error.__dict__.get("_record")  # from a request further down: passed on as it came
        if record is not None:
            return pickle.dumps({**record, "request": record.get("request") or error.ref_id}, pickling.PROTOCOL)
    record = {**describe(error, where=where), "request": request}
    if _is_ours(error):
        with contextlib.suppress(Exception):  # a field of it cannot travel
            return pickle.dumps({**record, "ours": error}, pickling.PROTOCOL)
    return pickle.dumps({**record, "cause": _packed(error), "links": _packed_links(error)}, pickling.PROTOCOL)


def describe(error: BaseException, *, where: str = "") -> dict[str, Any]:
    """The record of an exception in plain text: all that a caller in another language can use of it."""
    return {
        "type": f"{type(error).__module__}.{type(error).__qualname__}",
        "text": shortened(_text_of(error)),
        "traceback": user_traceback(error),
        "where": where,
    }


def in_short(error: BaseException) -> str:
    """Its class and the beginning of its text, in one line: for records that are not signed."""
    text = " ".join(_text_of(error).split())
    short = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    return f"{short}: {text[:MOST_SHORT]}" if text else short


def rebuild(record: dict[str, Any], ref_id: str) -> BaseException:
    """The exception to raise at the caller, who has asked for the result of `ref_id`."""
    told = _told(record, ref_id)
    if "ours" in record:
        return _with_note(record["ours"], told)
    cause = _unpacked(record.get("cause"))
    if cause is not None:
        _link(cause, record.get("links", ()))
    short = record["type"].removeprefix("builtins.")
    error = _instance(cause)
    error.args = (cause if cause is not None else record["text"],)
    if cause is not None:
        error.__dict__.update(cause.__dict__)
        _copy_members(cause, error)
    error.__dict__.update(
        cause=cause,
        cause_type=short,
        remote_traceback=record["traceback"],
        ref_id=ref_id,
        _record=record,
        _message=f"{short}: {record['text']}\n\n{told}",
    )
    return error


def _told(record: dict[str, Any], ref_id: str) -> str:
    """Where it was raised, and the traceback, unless no code of the user's had run."""
    request = record.get("request") or ref_id
    where = f" ({record['where']})" if record["where"] else ""
    on_behalf = f", on behalf of {ref_id}" if request != ref_id else ""
    raised = f"raised in request {request}{where}{on_behalf}"
    text: str = record["traceback"]
    return f"{raised}; remote traceback:\n{text.rstrip()}" if "Traceback (most recent call last)" in text else raised


def _is_ours(error: BaseException) -> bool:
    return type(error).__module__ == MillstreamError.__module__


def _with_note(error: BaseException, told: str) -> BaseException:
    """One of ours, raised by code of the user's: say where. Once, however many deployments it comes through."""
    if "remote traceback" in told and not getattr(error, "__notes__", None):
        error.add_note(told)
    return error


# the exception itself


def _packed(error: BaseException) -> bytes | None:
    """The pickled exception, or what of it can be pickled; None where its class cannot."""
    with contextlib.suppress(Exception):
        if (whole := _whole(error)) is not None:
            return whole
    with contextlib.suppress(Exception):
        parts = pickling.dump(_Parts(error), what="exception")
        pickling.load(parts)
        return parts
    return None


def _whole(error: BaseException) -> bytes | None:
    """As it pickles itself; None if it is too large or comes back without what its `__slots__` held."""
    whole = pickling.dump(error, what="exception")
    if len(whole) > MOST_BYTES:
        return None
    again = pickling.load(whole)  # some pickle and cannot be loaded: their __init__ wants what args does not hold
    return whole if isinstance(again, BaseException) and _slots(again).keys() == _slots(error).keys() else None


class _Parts:
    """Pickles as the class, the arguments and the attributes of an exception, those that can; its constructor is not asked."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> tuple[Any, ...]:
        error = self._error
        if isinstance(error, BaseExceptionGroup):
            arguments: tuple[Any, ...] = (error.message, [_portable(one) for one in error.exceptions])
        else:
            arguments = tuple(_or_text(argument) for argument in error.args)
        state = {name: value for name, value in {**error.__dict__, **_slots(error)}.items() if _fits(value)}
        return _assembled, (type(error), arguments, state)


def _assembled(cls: type[BaseException], arguments: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = _made(cls, arguments)
    error.args = arguments
    for name, value in state.items():
        object.__setattr__(error, name, value)
    return error


def _portable(error: BaseException) -> BaseException | _Parts:
    with contextlib.suppress(Exception):
        if _whole(error) is not None:
            return error
    return _Parts(error)


def _fits(value: Any) -> bool:
    try:
        return len(pickling.dump(value, what="attribute")) <= MOST_PART_BYTES
    except Exception:
        return False


def _or_text(value: Any) -> Any:
    if _fits(value):
        return value
    try:
        return shortened(value if isinstance(value, str) else repr(value), MOST_PART_BYTES // 4)
    except Exception:
        return f"<{type(value).__name__} without a text>"


def _unpacked(packed: bytes | None) -> BaseException | None:
    if packed is None:
        return None
    try:
        error = pickling.load(packed)
    except Exception:
        return None  # its class cannot be imported or built here: the text says what it was
    return error if isinstance(error, BaseException) else None


def _packed_links(error: BaseException) -> list[tuple[bool, bytes]]:
    """What it was raised from, or in the handling of, and what that was: (is it a cause?, packed), as far as it goes."""
    links: list[tuple[bool, bytes]] = []
    while len(links) < MOST_LINKS:
        further = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        packed = None if further is None else _packed(further)
        if further is None or packed is None or len(packed) > MOST_PART_BYTES:
            break
        links.append((further is error.__cause__, packed))
        error = further
    return links


def _link(error: BaseException, links: Any) -> None:
    for is_cause, packed in links:
        further = _unpacked(packed)
        if further is None:
            return
        if is_cause:
            error.__cause__ = further
        else:
            error.__context__ = further
        error = further


def _slots(error: BaseException) -> dict[str, Any]:
    """What classes of the user's keep in `__slots__`."""
    return {
        name: getattr(error, name)
        for cls in type(error).__mro__
        if cls.__flags__ & _HEAP_TYPE
        for name, member in vars(cls).items()
        if isinstance(member, MemberDescriptorType) and hasattr(error, name)
    }


def _copy_members(cause: BaseException, error: BaseException) -> None:
    """What built-in errors keep outside `__dict__`: `errno` and `filename`, `encoding`, `name`."""
    for cls in type(cause).__mro__:
        for name, member in vars(cls).items():
            if isinstance(member, MemberDescriptorType) and isinstance(error, cls) and not name.startswith("_"):
                with contextlib.suppress(AttributeError, TypeError):
                    setattr(error, name, getattr(cause, name))


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as e:
        return f"<str() of it raised {type(e).__name__}>"


class _RemoteError(TaskError):
    """What both faces share: pickles as its record, prints as the remote traceback, falls through to the cause."""

    def __str__(self) -> str:
        return str(self.__dict__.get("_message", ""))

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild, (self.__dict__["_record"], self.ref_id)

    def __getattr__(self, name: str) -> Any:
        cause = self.__dict__.get("cause")
        if cause is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(cause, name)


_RemoteError.__name__ = _RemoteError.__qualname__ = "TaskError"
_RemoteError.__module__ = "millstream.errors"


_ENDS_AN_ITERATION = (StopIteration, StopAsyncIteration)


@lru_cache(maxsize=256)
def _both(cls: type[BaseException]) -> type[_RemoteError]:
    """TaskError and `cls` in one class; TaskError alone where Python cannot combine them, or ours to raise them.

    A SystemExit would end the caller's process, a CancelledError its task, a StopIteration its generator.
    """
    if issubclass(TaskError, cls) or not issubclass(cls, Exception) or issubclass(cls, _ENDS_AN_ITERATION):
        return _RemoteError
    try:
        name = f"TaskError({cls.__qualname__})"
        return type(name, (_RemoteError, cls), {"__module__": "millstream.errors", "__qualname__": name})
    except Exception:  # layouts that do not fit, or an `__init_subclass__` that refuses
        return _RemoteError


def _instance(cause: BaseException | None) -> BaseException:
    """Of both classes, and empty: no constructor of the user's runs."""
    if cause is not None:
        with contextlib.suppress(Exception):
            return _made(_both(type(cause)), cause.args)  # type: ignore[arg-type] # mypy: a class is hashable
    return _RemoteError.__new__(_RemoteError)


def _made(cls: type[BaseException], arguments: tuple[Any, ...]) -> BaseException:
    """An instance without its constructor, by that of the C class whose layout it has. TypeError if there is none."""
    if issubclass(cls, BaseExceptionGroup):
        return BaseExceptionGroup.__new__(cls, *arguments[:2])
    for base in cls.__mro__:
        if not base.__flags__ & _HEAP_TYPE:
            new: Any = base.__new__
            with contextlib.suppress(TypeError):  # the layout is that of another base
                error: BaseException = new(cls)
                return error
    raise TypeError(f"{cls.__name__} cannot be made")
