"""Turning values into bytes and back: plain pickle first, cloudpickle where it can't, and a named culprit where neither can.

The only module that imports cloudpickle. Nothing here verifies signatures: `codec` does that before it calls `load`.
"""

import contextlib
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle

from millstream.errors import PayloadTooLargeError, SerializationError

PROTOCOL = 5
MOST_STEPS = 100  # into what cannot be pickled, in search of the part that is in the way
PAYLOAD_LIMIT_BYTES = 512 * 1024 * 1024  # the server's own limit for one string (proto-max-bulk-len)

_plain_dumps = pickle.dumps
load = pickle.loads


def dump(value: Any, what: str, replace: Callable[[Any], Any] | None = None) -> bytes:
    """Pickle `value`; `what` names it in errors ("argument of app.Model").

    Plain pickle stores what `__main__` defines by name, which no replica could look up: such values go by value.
    `replace` may turn an object that cannot be pickled itself (an asyncio.Task) into one that can; it is only asked
    when plain pickle has failed, and returns its argument unchanged to decline.

    Raises SerializationError naming the attribute path, PayloadTooLargeError past the limit.
    """
    try:
        data = _plain_dumps(value, PROTOCOL)
        if b"__main__" in data:
            data = _dump_by_value(value, replace)
    except Exception:
        data = _dump_or_explain(value, what, replace)
    if len(data) > PAYLOAD_LIMIT_BYTES:
        raise PayloadTooLargeError(
            f"{what} takes {len(data):,} bytes, the limit is {PAYLOAD_LIMIT_BYTES:,}; store it elsewhere and pass its address"
        )
    return data


def _dump_or_explain(value: Any, what: str, replace: Callable[[Any], Any] | None) -> bytes:
    try:
        return _dump_by_value(value, replace)
    except Exception as e:
        path, culprit, reason = _find_culprit(value, "", replace, e, set()) or ("", value, e)
        where = f"{what}{path}"
        raise SerializationError(
            f"{where} cannot be pickled: {type(culprit).__name__} object ({reason}); pass what it is built from, "
            "or create it inside the deployment's constructor",
            path=where,
        ) from e


def _dump_by_value(value: Any, replace: Callable[[Any], Any] | None) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, replace).dump(value)
    return buffer.getvalue()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, buffer: io.BytesIO, replace: Callable[[Any], Any] | None) -> None:
        super().__init__(buffer, protocol=PROTOCOL)
        self._replace = replace

    def reducer_override(self, obj: Any) -> Any:
        if self._replace is not None and (other := self._replace(obj)) is not obj:
            return other.__reduce__()
        return super().reducer_override(obj)


def _find_culprit(
    value: Any, path: str, replace: Callable[[Any], Any] | None, error: BaseException, seen: set[int]
) -> tuple[str, Any, BaseException] | None:
    """A part of `value` that fails by itself, not for one of its own parts: (path to it, the part, its error).

    None where everything that fails in it was `seen` before: objects may contain each other.
    """
    seen.add(id(value))
    fails_by_itself = True
    for step, child in _children(value) if len(seen) < MOST_STEPS else ():
        if id(child) in seen:
            fails_by_itself = False
            continue
        try:
            _dump_by_value(child, replace)
        except Exception as e:
            fails_by_itself = False
            if found := _find_culprit(child, path + step, replace, e, seen):
                return found
    return (path, value, error) if fails_by_itself else None


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"[{key!r}]", item
    elif isinstance(value, list | tuple | set | frozenset):
        for number, item in enumerate(value):
            yield f"[{number}]", item
    else:
        for name in () if isinstance(value, type) else _attributes(value):
            with contextlib.suppress(AttributeError):  # a slot without a value
                yield f".{name}", getattr(value, name)
        for cell_name, cell in zip(
            getattr(getattr(value, "__code__", None), "co_freevars", ()),
            getattr(value, "__closure__", None) or (),
            strict=False,
        ):
            try:
                yield f".<closure {cell_name}>", cell.cell_contents
            except ValueError:  # a variable without a value yet
                continue


def _attributes(value: Any) -> list[str]:
    """Names of what an instance holds, in its `__dict__` and in the `__slots__` of its classes."""
    slots = [cls.__dict__.get("__slots__", ()) for cls in type(value).__mro__]
    names = [name for group in slots for name in ((group,) if isinstance(group, str) else group)]
    return [*getattr(value, "__dict__", {}), *names]
