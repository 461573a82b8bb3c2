"""A deployment's definition: its callable, its constructor arguments and what its process needs to import them.

Signed and pickled under the deployment's `definition` key. Only the warm parent of its replicas opens it, or in local mode
the process that wrote it.
"""

import importlib
import inspect
import os
import sys
from dataclasses import dataclass
from typing import Any

from millstream.broker import pickling
from millstream.broker.codec import Codec
from millstream.broker.fingerprint import fingerprint
from millstream.config import DeploymentConfig
from millstream.errors import DeployFailedError

ASYNC_ONGOING = 100  # default max_ongoing_requests of a deployment with an async method
REF = b"definition"  # takes the place of the ref in its signature
PYTHON = ".".join(map(str, sys.version_info[:2]))


@dataclass(frozen=True, slots=True)
class Definition:
    """What a replica is made of."""

    target: Any  # a class or function
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """Readable before anything of the user is imported."""

    python: str
    cwd: str
    path: list[str]
    body: bytes


@dataclass(frozen=True, slots=True)
class ByPath:
    """A callable that can be imported: `module` and the qualified name of it, or of the deployment made of it."""

    module: str
    name: str

    def find(self) -> Any:
        found: Any = importlib.import_module(self.module)
        for part in self.name.split("."):
            found = getattr(found, part)
        return getattr(found, "func_or_class", found)


def has_async_methods(target: Any) -> bool:
    """Does a class have a public async method (an async generator is one, too), or is a function async?"""
    if not inspect.isclass(target):
        return _is_async(target)
    names = [name for name in dir(target) if not name.startswith("_") or name == "__call__"]
    return any(_is_async(getattr(target, name, None)) for name in names)


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def max_ongoing(target: Any, config: DeploymentConfig) -> int:
    """How many requests a replica of this class or function runs at once, where its config leaves that open, too."""
    if config.max_ongoing_requests is not None:
        return config.max_ongoing_requests
    return ASYNC_ONGOING if has_async_methods(target) else config.sync_threads


def importable(target: Any) -> ByPath | None:
    """How to import `target`, or None for what `__main__`, a notebook or a function body defines: that goes by value."""
    module, name = target.__module__, target.__qualname__
    if module == "__main__" or "<" in name or module not in sys.modules:
        return None
    path = ByPath(module, name)
    try:
        return path if path.find() is target else None
    except (AttributeError, ImportError):
        return None


def by_name(target: Any) -> ByPath:
    """What `target` is called, whether or not that can be imported: for who has it in memory and only needs the rest."""
    return ByPath(str(getattr(target, "__module__", "")), getattr(target, "__qualname__", type(target).__qualname__))


def seal(codec: Codec, definition: Definition) -> bytes:
    """The signed bytes of a definition, with this process's cwd, import path and Python version. SerializationError."""
    what = f"the definition of {codec.tag}"
    target = definition.target
    if not isinstance(target, ByPath):
        target = importable(target) or target
    body = pickling.dump(Definition(target, definition.args, definition.kwargs), what=what)
    path = [entry or os.getcwd() for entry in sys.path]
    return codec.seal("definition", REF, pickling.dump(_Surroundings(PYTHON, os.getcwd(), path, body), what=what))


def code_of(codec: Codec, envelope: bytes, config: DeploymentConfig) -> str:
    """The fingerprint of a sealed definition: equal ones can be served by the same replicas. Safe to ask twice."""
    around: _Surroundings = codec.open("definition", REF, envelope)
    return fingerprint(around.body, around.path, (around.python, around.cwd, around.path, config.of_the_process))


def reopen(codec: Codec, envelope: bytes, target: Any) -> Definition:
    """In the process that sealed it: its arguments, unpickled anew each time, with `target` as it is in memory."""
    around: _Surroundings = codec.open("definition", REF, envelope)
    definition: Definition = pickling.load(around.body)
    return Definition(target, definition.args, definition.kwargs)


def open_definition(codec: Codec, envelope: bytes) -> Definition:
    """Verify, take over the import path, and import. Raises SignatureError, DeployFailedError, or what the import raises."""
    around: _Surroundings = codec.open("definition", REF, envelope)
    if around.python != PYTHON:
        raise DeployFailedError(
            f"deployment {codec.tag} was deployed from Python {around.python} and this node runs {PYTHON}; "
            "deploy it from the same minor version",
            deployment=codec.tag,
        )
    if os.path.isdir(around.cwd):
        os.chdir(around.cwd)
    sys.path.extend(entry for entry in around.path if entry not in sys.path)
    definition: Definition = pickling.load(around.body)
    if isinstance(definition.target, ByPath):
        return Definition(definition.target.find(), definition.args, definition.kwargs)
    return definition
