"""Who may import whom. Change the table in the same commit as the import, and say why."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("broker", "handles", "replicas", "autoscaler", "dashboard")
BASE = ("millstream.errors", "millstream.retry", "millstream.config", "millstream.clock")

# "base" lies below everything; "front" is the rest of `millstream/`, which joins the parts.
MAY_IMPORT = {
    "base": {"base"},
    "broker": {"base", "broker"},
    "handles": {"base", "broker", "handles"},
    "replicas": {"base", "broker", "handles", "replicas"},
    "autoscaler": {"base", "broker", "autoscaler"},
    "dashboard": {"base", "broker", "dashboard"},
    "front": {"base", *PARTS, "front"},
}

# Packages of others that are used in one part only.
USED_IN = {
    "redis": {"broker"},
    "hiredis": {"broker"},
    "cloudpickle": {"broker"},
    "starlette": {"dashboard"},
    "uvicorn": {"dashboard"},
    "click": {"front"},
    "subprocess": {"replicas", "front"},
    "multiprocessing": {"replicas", "front"},
}


@dataclass(frozen=True)
class Module:
    """One file of ours, and the names it imports: `a.b` for `import a.b`, `a.b` and `a.b.c` for `from a.b import c`."""

    name: str
    part: str
    imports: frozenset[str]
    is_relative: bool


def part_of(name: str) -> str:
    if name in BASE:
        return "base"
    second = name.split(".")[1] if "." in name else ""
    return second if second in PARTS else "front"


def read_module(path: Path, name: str) -> Module:
    tree = ast.parse(path.read_text(), str(path))
    found = [(name, is_relative) for node in ast.walk(tree) for name, is_relative in imported(node)]
    return Module(name, part_of(name), frozenset(name for name, _ in found), any(relative for _, relative in found))


def imported(node: ast.AST) -> Iterator[tuple[str, bool]]:
    """Every import statement counts, in functions and under TYPE_CHECKING, too."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, False) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield node.module or "", node.level > 0
        yield from ((f"{node.module}.{alias.name}", node.level > 0) for alias in node.names)


def read_modules() -> dict[str, Module]:
    paths = {path: f"millstream.{path.stem}" for path in (ROOT / "millstream").glob("*.py")}
    for folder in ("cli", "serve"):
        for path in (ROOT / "millstream" / folder).rglob("*.py"):
            paths[path] = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for part in PARTS:
        for path in (ROOT / part).rglob("*.py"):
            paths[path] = ".".join(("millstream", *path.relative_to(ROOT).with_suffix("").parts))
    names = {path: name.removesuffix(".__init__") for path, name in paths.items()}
    return {name: read_module(path, name) for path, name in names.items()}


MODULES = read_modules()


def ours(module: Module) -> set[str]:
    """The modules of ours that this one imports."""
    return {name for name in module.imports if name in MODULES and name != module.name} - parents(module)


def parents(module: Module) -> set[str]:
    """`from millstream.broker import keys` names the package and the module; only the module is meant."""
    return {
        name
        for name in module.imports
        if any(other.startswith(name + ".") for other in module.imports & MODULES.keys())
    }


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(edges[name]):
                if cycle := visit(other, [*path, name]):
                    return cycle
            done.add(name)
        return []

    for name in sorted(edges):
        if cycle := visit(name, []):
            return cycle
    return []


def test_all_parts_were_read() -> None:
    assert {"millstream.errors", "millstream.config", "millstream.broker.scripts"} <= MODULES.keys()
    assert "millstream.broker.keys" in ours(MODULES["millstream.broker.scripts"])


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_imports_only_what_its_part_may(name: str) -> None:
    module = MODULES[name]

    forbidden = {other for other in ours(module) if part_of(other) not in MAY_IMPORT[module.part]}

    assert forbidden == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_uses_packages_of_others_only_in_their_part(name: str) -> None:
    module = MODULES[name]

    used = {other.split(".")[0] for other in module.imports}

    assert {other for other in used if module.part not in USED_IN.get(other, {module.part})} == set()


@pytest.mark.parametrize("name", [name for name in BASE if name in MODULES])
def test_base_needs_the_standard_library_only(name: str) -> None:
    tops = {other.split(".")[0] for other in MODULES[name].imports}

    assert tops - sys.stdlib_module_names <= {"millstream"}


def test_no_import_is_relative() -> None:
    assert [module.name for module in MODULES.values() if module.is_relative] == []


def test_no_module_goes_by_its_bare_name() -> None:
    assert [
        module.name for module in MODULES.values() if {name.split(".")[0] for name in module.imports} & {*PARTS}
    ] == []


def test_there_are_no_cycles() -> None:
    assert find_cycle({name: ours(module) for name, module in MODULES.items()}) == []


# the checks themselves


def test_cycle_is_found() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_imports_in_functions_and_for_type_checkers_count() -> None:
    tree = ast.parse(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a.b import c\ndef f():\n    import d.e\nfrom . import g"
    )

    names = {name for node in ast.walk(tree) for name, _ in imported(node)}

    assert names >= {"a.b", "a.b.c", "d.e"}
    assert any(is_relative for node in ast.walk(tree) for _, is_relative in imported(node))
