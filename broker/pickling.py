"""Turning values into bytes and back: plain pickle first, cloudpickle where it can't, and a named culprit where neither can.

The only module that imports cloudpickle. Nothing here verifies signatures: `codec` does that before it calls `load`.
"""

import contextlib
import io
import os
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

import cloudpickle

from millstream.broker import memory
from millstream.errors import ConfigError, PayloadTooLargeError, SerializationError

PROTOCOL = 5
MOST_STEPS = 100  # into what cannot be pickled, in search of the part that is in the way
LARGE_BYTES = 64 * 1024  # larger ones travel in keys of their own, and large buffers beside their pickle
MOST_BYTES = 512_000_000  # by default; more of them fill the server. It has no such limit itself: values go in pieces

_plain_dumps = pickle.dumps
load = pickle.loads


Buffer = bytes | memoryview


class Pickled(NamedTuple):
    """A large pickled value. `buffers` are its large buffers (arrays), which lie beside the pickle and are views of it."""

    data: bytes
    buffers: list[memoryview]

    @property
    def size_bytes(self) -> int:
        return len(self.data) + sum(map(len, self.buffers))

    def snapshot(self) -> "Pickled":
        """With copies of the buffers: for who gives the value back before it is written."""
        return Pickled(self.data, [memory.copy(buffer) for buffer in self.buffers])


def dump_plain(value: Any) -> bytes | None:
    """Pickle a value that takes nothing special, as most do: no large buffers, and known by name wherever it is read. Else
    None. What comes out may be large."""
    try:
        data = _plain_dumps(value, PROTOCOL, buffer_callback=_refuse_large)
    except Exception:  # `dump_parts` finds out why
        return None
    return data if b"__main__" not in data else None


def large(data: bytes, what: str) -> Pickled:
    """What `dump_plain` has made, where it is large. Raises PayloadTooLargeError past the limit."""
    _check_size(len(data), what)
    return Pickled(data, [])


def dump_parts(value: Any, what: str, replace: Callable[[Any], Any] | None = None) -> bytes | Pickled:
    """Pickle `value`; `what` names it in errors ("argument of app.Model"). A large one stays in parts.

    Plain pickle stores what `__main__` defines by name, which no replica could look up: such values go by value.
    `replace` may turn an object that cannot be pickled itself (an asyncio.Task) into one that can; it is only asked
    when plain pickle has failed, and returns its argument unchanged to decline.

    Raises SerializationError naming the attribute path, PayloadTooLargeError past the limit.
    """
    buffers: list[memoryview] = []
    try:
        data = _plain_dumps(value, PROTOCOL, buffer_callback=_refuse_large)
        if b"__main__" in data:
            data = _dump_by_value(value, replace)
    except Exception:  # a _LargeBuffer, too
        data = _dump_or_explain(value, what, replace, buffers)
    if not buffers and len(data) <= LARGE_BYTES:
        _check_size(len(data), what)
        return data
    pickled = Pickled(data, buffers)
    _check_size(pickled.size_bytes, what)
    return pickled


class _LargeBuffer(Exception):
    """Not an error: pickle has met an array that should lie beside it."""


def _refuse_large(buffer: pickle.PickleBuffer) -> bool:
    """Pickle's question about each buffer (PEP 574); True puts it into the pickle. No closure: asked for on each dump."""
    try:
        if len(buffer.raw()) <= LARGE_BYTES:
            return True
    except BufferError:  # not contiguous
        return True
    raise _LargeBuffer


def dump(value: Any, what: str, replace: Callable[[Any], Any] | None = None) -> bytes:
    """As `dump_parts`, in one piece."""
    try:
        data = _plain_dumps(value, PROTOCOL)
        if b"__main__" in data:
            data = _dump_by_value(value, replace)
    except Exception:
        data = _dump_or_explain(value, what, replace)
    _check_size(len(data), what)
    return data


def _check_size(size_bytes: int, what: str) -> None:
    if size_bytes > limit_bytes():
        raise PayloadTooLargeError(
            f"{what} takes {size_bytes:,} bytes, the limit is {limit_bytes():,}; store it elsewhere and pass its "
            "address, or raise MILLSTREAM_PAYLOAD_LIMIT, here and for the replicas"
        )


@cache
def limit_bytes() -> int:
    """The most that one value may take: MILLSTREAM_PAYLOAD_LIMIT in bytes, 512 MB without it. Raises ConfigError."""
    text = os.environ.get("MILLSTREAM_PAYLOAD_LIMIT", "")
    if not text:
        return MOST_BYTES
    if not text.isdecimal() or int(text) < LARGE_BYTES:
        raise ConfigError(f"MILLSTREAM_PAYLOAD_LIMIT={text!r} must be a number of bytes, {LARGE_BYTES:,} or more")
    return int(text)


def _dump_or_explain(
    value: Any, what: str, replace: Callable[[Any], Any] | None, buffers: list[memoryview] | None = None
) -> bytes:
    """By value; large buffers go to `buffers`, where it is given."""
    try:
        return _dump_by_value(value, replace, buffers)
    except Exception as e:
        path, culprit, reason = _find_culprit(value, "", replace, e, set()) or ("", value, e)
        where = f"{what}{path}"
        raise SerializationError(
            f"{where} cannot be pickled: {type(culprit).__name__} object ({reason}); pass what it is built from, "
            "or create it inside the deployment's constructor",
            path=where,
        ) from e


def _dump_by_value(value: Any, replace: Callable[[Any], Any] | None, buffers: list[memoryview] | None = None) -> bytes:
    def keep_aside(buffer: pickle.PickleBuffer) -> bool:
        try:
            return _refuse_large(buffer)
        except _LargeBuffer:
            buffers.append(buffer.raw())  # type: ignore[union-attr]
            return False

    file = io.BytesIO()
    _Pickler(file, replace, None if buffers is None else keep_aside).dump(value)
    return file.getvalue()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(
        self,
        file: io.BytesIO,
        replace: Callable[[Any], Any] | None,
        keep_aside: Callable[[pickle.PickleBuffer], bool] | None,
    ) -> None:
        super().__init__(file, protocol=PROTOCOL, buffer_callback=keep_aside)
        self._replace = replace

    def reducer_override(self, obj: Any) -> Any:
        if self._replace is not None and (other := self._replace(obj)) is not obj:
            return other.__reduce__()
        if isinstance(obj, CodeType):
            return self._reduce_code(obj)
        return super().reducer_override(obj)

    def _reduce_code(self, code: CodeType) -> Any:
        """With the name of its file, which cloudpickle leaves out from 3.1.3 on: remote tracebacks show lines of it."""
        make, arguments = self.dispatch_table[CodeType](code)
        name = "".join(code.co_filename)  # a new text: whether one is shared changes the pickle
        return make, tuple(name if type(one) is str and one == "<dynamic-code>" else one for one in arguments)


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
