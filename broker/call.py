"""A Lua script of `lua/`, and a call of it: what `Link.run` (hot transport) and `run` (redis-py) carry out.

Both deal with NOSCRIPT themselves.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import resources
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Script:
    """One Lua file, its includes put in, with its SHA-1."""

    __slots__ = ("name", "sha", "source")

    def __init__(self, name: str) -> None:
        self.name = name
        self.source = "".join(_with_includes(name)).encode()
        self.sha = hashlib.sha1(self.source).hexdigest().encode()


def _with_includes(name: str) -> Iterable[str]:
    text = resources.files("millstream.broker").joinpath("lua", f"{name}.lua").read_text()
    for line in text.splitlines(keepends=True):
        word, _, included = line.strip().partition(" ")
        yield from _with_includes(included) if word == "--include" else (line,)


@cache
def script(name: str) -> Script:
    return Script(name)


class Call(Generic[T]):
    """A script with its keys and arguments, and how to read what it answers."""

    __slots__ = ("arguments", "keys", "read", "script")

    def __init__(self, script: Script, keys: Sequence[str], arguments: Sequence[Any], read: Callable[[Any], T]) -> None:
        self.script, self.keys, self.arguments, self.read = script, keys, arguments, read

    def command(self) -> tuple[Any, ...]:
        return ("EVALSHA", self.script.sha, len(self.keys), *self.keys, *self.arguments)

    def full_command(self) -> tuple[Any, ...]:
        """As `command`, with the source: for a server that answered NOSCRIPT."""
        return ("EVAL", self.script.source, len(self.keys), *self.keys, *self.arguments)
