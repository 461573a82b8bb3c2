"""What code a deployment runs, as a short text. Where two deploys have the same one, running replicas may stay.

Errs towards "changed": that costs a rolling restart, and the other mistake would leave old code running. It covers the
pickled definition, the Python files that it leads to or that the deploying process has loaded, and the installed
packages. It cannot see data files, nor modules whose names are put together at run time: for these, `version=`.
"""

import ast
import functools
import hashlib
import os
import pickletools
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cloudpickle import cloudpickle

from millstream.config import IGNORED_OPTIONS, IN_PLACE

TEXTS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
GETS = {"BINGET", "LONG_BINGET"}
OURS = "millstream"
MOST_KNOWN = 10_000  # files
LONGEST_NAME = 200  # of a module; a longer text is no name
DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
IMPORT = re.compile(
    rb"^[ \t]*(?:from[ \t]+([.\w]+)[ \t]+import[ \t]*(\([^)]*\)|[^\n#]*)|import[ \t]+([^\n#;]*))", re.MULTILINE
)
WITH_OPTIONS = re.compile(rb"@[ \t]*[\w.]*deployment[ \t]*\(|\.options\(")
LIBRARIES = tuple(
    {
        os.path.realpath(path) + os.sep
        for path in map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))
    }
)
PACKAGES = re.compile(r"[/\\](site|dist)-packages[/\\]")  # also the user's own, and the distribution's
APPLIED_IN_PLACE = (IN_PLACE - {"autoscaling"}) | IGNORED_OPTIONS | {"autoscaling_config", "max_concurrent_queries"}


def fingerprint(body: bytes, path: list[str], surroundings: Any) -> str:
    """`body`: a pickle; `path`: where its imports are looked for; `surroundings`: whatever else makes a difference."""
    digest = hashlib.blake2b(repr(surroundings).encode(), digest_size=16)
    names = _loaded()
    for token in _tokens(body):
        digest.update(token if isinstance(token, bytes) else repr(token).encode())
        if isinstance(token, str) and len(token) < LONGEST_NAME and DOTTED.fullmatch(token):
            names.add(token)
    for file, source in sorted(_sources(names, [Path(entry) for entry in path if not _is_library(entry)])):
        digest.update(f"\0{file}\0".encode() + source.code)
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        if os.path.isdir(site):
            digest.update(f"\0{os.stat(site).st_mtime_ns}".encode())  # whatever installs a package writes here
    return digest.hexdigest()


# the definition


def _tokens(body: bytes) -> Iterator[Any]:
    """What a pickle says, without what differs from one process to the next: class ids, and which texts are one object."""
    class_ids = getattr(cloudpickle, "_DYNAMIC_CLASS_TRACKER_BY_ID", {})
    memo: list[Any] = []
    objects, last = 0, None
    for opcode, argument, _ in pickletools.genops(body):
        if opcode.name == "MEMOIZE":
            if isinstance(last, str):
                memo.append(last)
            else:
                memo.append((objects,))
                objects += 1
            continue
        if opcode.name == "FRAME":
            continue
        if opcode.name in GETS:
            last = memo[int(argument or 0)]
        elif opcode.name in TEXTS:
            last = "" if argument in class_ids else argument
        elif isinstance(argument, bytes | bytearray):
            last = bytes(argument)
        else:
            last = (opcode.name, argument)
        yield last


# the files


def _loaded() -> set[str]:
    """Names of the modules that this process has loaded, and that are not part of Python, of a package or of us."""
    found = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name != "__main__" and not _is_ours(name) and not _is_library(file):
            found.add(name)
    return found


class Source(NamedTuple):
    """What matters of a file."""

    code: bytes  # a digest of its code
    imports: tuple[str, ...]  # names that may be modules; only of Python files


_known: dict[bytes, Source] = {}  # by a digest of content, package and suffix: an application has many deployments


def _read(file: Path, package: str) -> Source:
    """Raises OSError."""
    content = file.read_bytes()
    key = hashlib.blake2b(f"{package}\0{file.suffix}\0".encode() + content, digest_size=16).digest()
    known = _known.get(key)
    if known is None:
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        imports = tuple(dict.fromkeys(_imports(content, package))) if file.suffix == ".py" else ()
        known = _known[key] = Source(hashlib.blake2b(_code(content), digest_size=16).digest(), imports)
    return known


def _sources(names: set[str], roots: list[Path]) -> Iterator[tuple[str, Source]]:
    """Every file that these names, and the imports in the files, lead to."""
    seen: set[Path] = set()
    looked_for = set(names)
    todo = [(name, file) for name in names for file in _files(name, roots)]
    while todo:
        name, file = todo.pop()
        if file in seen:
            continue
        seen.add(file)
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        try:
            source = _read(file, package)
        except OSError:
            continue
        yield str(file), source
        others = [name for name in source.imports if name not in looked_for]
        looked_for.update(others)
        todo += [(other, found) for other in others for found in _files(other, roots)]


def _files(name: str, roots: list[Path]) -> Iterator[Path]:
    if _is_ours(name):
        return
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None) if name != "__main__" else None
    if file and not _is_library(file):
        yield Path(file)
    for root in roots:
        place = root.joinpath(*name.split("."))
        for found in (place / "__init__.py", place.with_name(place.name + ".py")):
            if found.is_file():
                yield found


def _imports(source: bytes, package: str) -> Iterator[str]:
    """Names that may be modules, of every import in a file: also of those inside functions, which run later."""
    for base, names, modules in IMPORT.findall(source):
        for module in modules.decode(errors="replace").split(","):
            yield from _with_parents(module.split(" as ")[0].strip())
        start = _absolute(base.decode(errors="replace"), package)
        yield from _with_parents(start)
        for name in re.findall(r"\w+", names.decode(errors="replace")):
            if start:
                yield f"{start}.{name}"


def _absolute(name: str, package: str) -> str:
    relative = name.lstrip(".")
    if relative == name:
        return name
    up = len(name) - len(relative) - 1
    base = package.rsplit(".", up)[0] if up else package
    return f"{base}.{relative}".strip(".")


def _with_parents(name: str) -> Iterator[str]:
    while DOTTED.fullmatch(name):
        yield name
        name = name.rpartition(".")[0]


def _code(source: bytes) -> bytes:
    """A file without the options that need no restart: to change one of them in the code is no change of the code."""
    if not WITH_OPTIONS.search(source):
        return source  # nearly always: to take one apart costs some 50 ms
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return source
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("deployment"):
                    _drop_options(decorator)
        elif isinstance(node, ast.Call) and _is(node, "bind") and _is(node.func.value, "options"):  # type: ignore[attr-defined]
            _drop_options(node.func.value)  # type: ignore[attr-defined]
    return ast.dump(tree).encode()


def _is(node: Any, method: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method


def _drop_options(call: ast.Call) -> None:
    call.keywords = [one for one in call.keywords if one.arg not in APPLIED_IN_PLACE]


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] == OURS


@functools.lru_cache(maxsize=10_000)
def _is_library(path: str) -> bool:
    real = os.path.realpath(path) + os.sep
    return real.startswith(LIBRARIES) or PACKAGES.search(real) is not None
