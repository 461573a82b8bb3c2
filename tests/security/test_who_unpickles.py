"""Who unpickles: a few named modules, behind a verified signature. Nobody who only looks after replicas, ever."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_architecture import MODULES, ROOT

# What may call a function that unpickles, and why.
LOADERS = {
    "millstream.broker.pickling": "names the one function that does",
    "millstream.broker.codec": "after it has verified the signature",
    "millstream.broker.remote_errors": "parts of an error whose envelope was verified, or that it has just pickled",
    "millstream.broker.definitions": "the callable inside of a definition whose envelope was verified",
}
# What may open an envelope: all of it in replicas, their warm parents, callers, or a command that was asked for a value.
OPENERS = {
    "millstream.broker.outcomes": "a value or an error, for whoever has asked for the result",
    "millstream.broker.definitions": "a definition, for the parent of its replicas, or for who deploys it again",
    "millstream.replicas.execution": "arguments, to run the request",
    "millstream.handles.stream_cell": "items, for their reader",
    "millstream.handles.streaming": "items, for their reader",
}
UNPICKLES = {"load", "loads", "Unpickler"}
LOOK_AFTER = (
    "millstream.autoscaler",
    "millstream.dashboard",
    "millstream.replicas.launcher",
    "millstream.replicas.parents",
)


def path_of(name: str) -> Path:
    stem = ROOT.joinpath(*name.split(".")[1:]) if name.split(".")[1] in {
        "broker", "handles", "replicas", "autoscaler", "dashboard"
    } else ROOT.joinpath(*name.split("."))  # fmt: skip
    return stem.with_suffix(".py") if stem.with_suffix(".py").exists() else stem / "__init__.py"


def calls(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(what it is asked of, what is called) of every call and every other use of an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node.value), node.attr


def unpickles(text: str) -> bool:
    for owner, name in calls(ast.parse(text)):
        if name in UNPICKLES and owner.rpartition(".")[2] in {"pickle", "cloudpickle", "pickling", "marshal", "shelve"}:
            return True
    return False


def opens(text: str) -> bool:
    return any(
        (name == "open" and owner.rpartition(".")[2].lstrip("_") == "codec")
        or (name == "load" and owner != "json" and owner.rpartition(".")[2] != "pickling")
        for owner, name in calls(ast.parse(text))
    )


def needs(name: str, seen: set[str]) -> set[str]:
    """A module and all that it imports, directly or not, at its head or in a function."""
    if name not in seen:
        seen.add(name)
        for other in MODULES[name].imports & MODULES.keys():
            needs(other, seen)
    return seen


def test_only_these_modules_unpickle() -> None:
    found = {name for name in MODULES if "." in name and unpickles(path_of(name).read_text())}

    assert found == LOADERS.keys()


def test_only_these_modules_open_envelopes() -> None:
    found = {name for name in MODULES if "." in name and opens(path_of(name).read_text())} - LOADERS.keys()

    assert found == OPENERS.keys() - LOADERS.keys()


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith(LOOK_AFTER)))
def test_who_looks_after_replicas_opens_nothing(name: str) -> None:
    text = path_of(name).read_text()

    assert not unpickles(text) and not opens(text)
    assert not {"open_stored", "rebuild", "open_definition", "reopen", "code_of"} & {
        alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_nothing_else_runs_code_out_of_data() -> None:
    """No eval, exec or YAML, and no import by a name that came from Redis, where records are read."""
    found = set()
    for name in MODULES:
        if "." in name:
            for node in ast.walk(ast.parse(path_of(name).read_text())):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id in {"eval", "exec", "__import__"}
                ):
                    found.add(name)

    assert found == set()


# the checks themselves


def test_use_is_found() -> None:
    assert unpickles("import pickle\nload = pickle.loads") and unpickles("pickling.load(x)")
    assert opens("self._codec.open('value', ref, body)") and opens("large.load()") and not opens("json.load(f)")
