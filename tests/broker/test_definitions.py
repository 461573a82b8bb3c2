"""Definitions: by name what can be imported, by value the rest, signed, and opened with the deployer's import path."""

import dataclasses
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from millstream.broker import definitions, pickling
from millstream.broker.codec import Codec
from millstream.broker.definitions import ByPath, Definition, importable, open_definition, seal
from millstream.errors import DeployFailedError, SerializationError, SignatureError

CODEC = Codec(b"a secret", "ms", "app.Model")


class Model:
    """Importable by anyone who can import this module."""

    class Inner:
        pass


class Wrapped:
    """What a decorator leaves under the name of a class."""

    def __init__(self, func_or_class: Any) -> None:
        self.func_or_class = func_or_class


class _Decorated:
    pass


_Decorated.__name__ = _Decorated.__qualname__ = "Decorated"
Decorated = Wrapped(_Decorated)


def double(value: int) -> int:
    return 2 * value


@pytest.fixture(autouse=True)
def place_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(Path.cwd())


def round_trip(target: Any, *args: Any, **kwargs: Any) -> Definition:
    return open_definition(CODEC, seal(CODEC, Definition(target, args, kwargs)))


def test_class_and_arguments_come_back() -> None:
    definition = round_trip(Model, 1, "two", three=[3])

    assert definition == Definition(Model, (1, "two"), {"three": [3]})


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (Model, ByPath(__name__, "Model")),
        (Model.Inner, ByPath(__name__, "Model.Inner")),
        (double, ByPath(__name__, "double")),
        (_Decorated, ByPath(__name__, "Decorated")),
        (dataclasses.dataclass, ByPath("dataclasses", "dataclass")),
    ],
)
def test_what_can_be_imported_goes_by_name(target: Any, path: ByPath) -> None:
    assert importable(target) == path
    assert round_trip(target).target is target


def test_what_a_function_body_or_main_defines_goes_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def triple(value: int) -> int:
        return 3 * value

    from_main = type("FromMain", (), {"__module__": "__main__", "answer": lambda self: 42})

    assert importable(triple) is None and importable(from_main) is None
    assert round_trip(triple).target(2) == 6
    assert round_trip(from_main).target().answer() == 42


def test_namesake_of_something_importable_goes_by_value() -> None:
    namesake = type("Model", (), {"__module__": __name__, "__qualname__": "Model", "answer": lambda self: 42})

    assert importable(namesake) is None
    assert round_trip(namesake).target().answer() == 42


def test_argument_that_cannot_be_pickled_is_named() -> None:
    with pytest.raises(SerializationError, match=r"the definition of app\.Model\.args\[0\].* cannot be pickled"):
        seal(CODEC, Definition(Model, (threading.Lock(),), {}))


def test_replica_works_where_the_deployer_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_there.py").write_text("class Served: pass")
    with monkeypatch.context() as deployer:
        deployer.chdir(tmp_path)
        deployer.syspath_prepend(str(tmp_path))
        served = __import__("only_there").Served
        envelope = seal(CODEC, Definition(served, (), {}))
    monkeypatch.delitem(sys.modules, "only_there")
    assert str(tmp_path) not in sys.path

    definition = open_definition(CODEC, envelope)

    assert definition.target.__name__ == "Served"
    assert Path.cwd() == tmp_path


def test_other_minor_version_of_python_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as deployer:
        deployer.setattr(definitions, "PYTHON", "3.9")
        envelope = seal(CODEC, Definition(Model, (), {}))

    with pytest.raises(DeployFailedError, match=r"deployed from Python 3\.9 and this node runs") as caught:
        open_definition(CODEC, envelope)

    assert caught.value.deployment == "app.Model"


def test_definition_of_another_deployment_is_refused() -> None:
    envelope = seal(CODEC, Definition(Model, (), {}))

    with pytest.raises(SignatureError):
        open_definition(Codec(b"a secret", "ms", "app.Other"), envelope)
    with pytest.raises(SignatureError):
        open_definition(CODEC, CODEC.seal("value", definitions.REF, pickling.dump("x", what="x")))
