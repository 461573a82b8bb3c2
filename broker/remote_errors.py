"""A user's exception on its way from the replica to the caller.

It arrives as an instance of both `TaskError` and its own class, with the remote traceback as text; where the class
cannot travel, be imported or be combined, as a plain `TaskError` that names it. Errors of millstream arrive as they are.
"""

import contextlib
import itertools
import os
import pickle
import traceback
from functools import lru_cache
from types import MemberDescriptorType
from typing import Any

from millstream.broker import pickling
from millstream.errors import MillstreamError, TaskError

_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_MACHINERY = tuple(
    f"{os.sep}{name}{os.sep}" for name in ("asyncio", "importlib", "uvloop", os.path.join("concurrent", "futures"))
)


def capture(error: BaseException, *, where: str = "") -> bytes:
    """The pickled record of an exception. `where` names replica and deployment in the text the caller will read."""
    if isinstance(error, TaskError):
        record = error.__dict__.get("_record")  # from a request further down: passed on as it came
        if record is not None:
            return pickle.dumps(record, pickling.PROTOCOL)
    if type(error).__module__ == MillstreamError.__module__:
        with contextlib.suppress(Exception):  # a field of it cannot travel
            return pickle.dumps({"ours": error}, pickling.PROTOCOL)
    cause: bytes | None
    try:
        cause = pickling.dump(error, what="exception")
        pickling.load(cause)  # some pickle and cannot be loaded: their __init__ wants what args does not hold
    except Exception:
        cause = None
    return pickle.dumps({**describe(error, where=where), "cause": cause}, pickling.PROTOCOL)


def describe(error: BaseException, *, where: str = "") -> dict[str, Any]:
    """The record of an exception in plain text: all that a caller in another language can use of it."""
    return {
        "type": f"{type(error).__module__}.{type(error).__qualname__}",
        "text": _text_of(error),
        "traceback": user_traceback(error),
        "where": where,
    }


def rebuild(record: dict[str, Any], ref_id: str) -> BaseException:
    """The exception to raise at the caller."""
    if "ours" in record:
        ours: BaseException = record["ours"]
        return ours
    cause: BaseException | None = None
    if record.get("cause") is not None:
        try:
            cause = pickling.load(record["cause"])
        except Exception:
            cause = None  # its class cannot be imported or built here: the text says what it was
    where = f" ({record['where']})" if record["where"] else ""
    short = record["type"].removeprefix("builtins.")
    error = _instance(type(cause) if cause is not None else None)
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
        _message=f"{short}: {record['text']}\n\nraised in request {ref_id}{where}; remote traceback:\n{record['traceback']}",
    )
    return error


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


def user_traceback(error: BaseException) -> str:
    """The traceback from the first frame of the user's on, chained causes included."""
    try:
        formatted = traceback.TracebackException.from_exception(error)
        return "".join(_without_our_frames(formatted).format())
    except Exception:  # a __str__ or __repr__ of the user's raised inside
        return f"{type(error).__name__} (its traceback could not be formatted)\n"


def _without_our_frames(formatted: traceback.TracebackException) -> traceback.TracebackException:
    seen: list[traceback.TracebackException | None] = [formatted]
    while seen:
        one = seen.pop()
        if one is not None:
            users = itertools.dropwhile(lambda frame: _is_machinery(frame.filename), one.stack)
            one.stack = traceback.StackSummary.from_list(list(users)) or one.stack
            seen += [one.__cause__, one.__context__]
    return formatted


def _is_machinery(filename: str) -> bool:
    """Is this what led to the user's code: ours, the event loop, the import system?"""
    return filename.startswith((_OURS, "<frozen")) or any(part in filename for part in _MACHINERY)


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


def _instance(cls: type[BaseException] | None) -> BaseException:
    both = _RemoteError if cls is None else _both(cls)  # type: ignore[arg-type]
    try:
        return both.__new__(both)
    except Exception:
        return _RemoteError.__new__(_RemoteError)
