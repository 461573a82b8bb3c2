"""Bytes out of values: plain pickle first, by value where a name would not be found, and a named culprit."""

import pickle
import pickletools
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from millstream.broker import pickling
from millstream.errors import PayloadTooLargeError, SerializationError


@dataclass
class Model:
    """Importable: travels by name."""

    weights: list[int]


@dataclass
class Guarded:
    """Cannot be pickled, for its lock."""

    name: str = "guarded"
    lock: Any = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class Slotted:
    """Has no `__dict__`."""

    name: str
    model: Any


class Future:
    """Stands for an asyncio.Task: cannot be pickled itself, but something can stand in for it."""

    def __reduce__(self) -> Any:
        raise TypeError("a future cannot be pickled")


def dump(value: Any, replace: Callable[[Any], Any] | None = None) -> bytes:
    return pickling.dump(value, what="argument", replace=replace)


def culprit(value: Any) -> str:
    with pytest.raises(SerializationError) as caught:
        dump(value)
    return caught.value.path


def dump_in_main(code: str) -> bytes:
    """Run a script that puts something into `result`; that, pickled in there."""
    program = f"""{textwrap.dedent(code)}
import sys
from millstream.broker import pickling
sys.stdout.buffer.write(pickling.dump(result, what="argument"))
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=20).stdout


def load_elsewhere(data: bytes, expression: str) -> str:
    """What `expression` over the unpickled `value` prints in a process with another `__main__`."""
    program = f"import pickle, sys; value = pickle.loads(sys.stdin.buffer.read()); print({expression})"
    done = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, check=True, timeout=20)
    return done.stdout.decode().strip()


# out and back


@pytest.mark.parametrize("value", [None, 1, "text", b"\x00\xff", [1, {"a": (2, 3)}], Model([1, 2])])
def test_value_comes_back(value: Any) -> None:
    assert pickling.load(dump(value)) == value


def test_plain_values_take_plain_pickle() -> None:
    value = {"rows": [Model([1]), Model([2])]}

    assert dump(value) == pickle.dumps(value, pickling.PROTOCOL)


def test_importable_class_travels_by_name() -> None:
    opcodes = [argument for _, argument, _ in pickletools.genops(dump(Model([1]))) if isinstance(argument, str)]

    assert "Model" in opcodes
    assert not any("weights: list" in argument for argument in opcodes)


def test_lambda_and_closure_travel() -> None:
    factor = 3

    multiply = pickling.load(dump(lambda value: value * factor))

    assert multiply(5) == 15


def test_what_main_defines_travels_by_value() -> None:
    data = dump_in_main("""
        OFFSET = 40
        class Adder:
            def __init__(self, by): self.by = by
            def add(self): return self.by + OFFSET
        result = [Adder(2)]
    """)

    assert load_elsewhere(data, "value[0].add()") == "42"


def test_function_of_main_travels_by_value() -> None:
    data = dump_in_main("""
        def helper(x): return x + 1
        def result(x): return helper(x) * 2
    """)

    assert load_elsewhere(data, "value(3)") == "8"


# replacing


def test_replacement_is_asked_only_when_plain_pickle_fails() -> None:
    asked: list[Any] = []

    def replace(value: Any) -> Any:
        asked.append(value)
        return value

    dump([1, "two", Model([3])], replace)

    assert asked == []


def test_replacement_stands_in_at_any_depth() -> None:
    future = Future()

    data = dump({"a": [1, (future, "x")]}, lambda value: Model([7]) if value is future else value)

    assert pickling.load(data) == {"a": [1, (Model([7]), "x")]}


def test_replacement_that_declines_leaves_the_error() -> None:
    with pytest.raises(SerializationError, match="a future cannot be pickled"):
        dump([Future()], lambda value: value)


# the culprit


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (threading.Lock(), "argument"),
        ([1, threading.Lock()], "argument[1]"),
        ((1, {"model": Guarded()}), "argument[1]['model'].lock"),
        ([{"model": Guarded()}], "argument[0]['model'].lock"),
        ({"a": {"b": [0, 0, Guarded()]}}, "argument['a']['b'][2].lock"),
        (Slotted("a", Guarded()), "argument.model.lock"),
        (Model([Guarded()]), "argument.weights[0].lock"),  # type: ignore[list-item]
    ],
)
def test_error_names_the_path_to_what_cannot_be_pickled(value: Any, path: str) -> None:
    assert culprit(value) == path


def test_error_says_what_it_is_why_and_what_to_do() -> None:
    with pytest.raises(SerializationError) as caught:
        dump([{"model": Guarded()}])

    message = str(caught.value)
    assert message.startswith("argument[0]['model'].lock cannot be pickled: lock object (")
    assert "constructor" in message
    assert isinstance(caught.value.__cause__, TypeError)


def test_error_names_what_a_closure_holds() -> None:
    lock = threading.Lock()

    assert culprit(lambda: lock) == "argument.<closure lock>"


def test_error_is_found_beside_a_variable_that_has_no_value_yet() -> None:
    lock = threading.Lock()

    def function() -> Any:
        return [early, lock]

    path = culprit(function)
    early = 1

    assert path == "argument.<closure lock>"


def test_error_is_found_in_a_structure_that_contains_itself() -> None:
    value: dict[str, Any] = {}
    value["self"] = value
    value["lock"] = threading.Lock()

    assert culprit(value) == "argument['lock']"


def test_error_is_found_where_a_child_knows_its_parent() -> None:
    parent, child = types.SimpleNamespace(), types.SimpleNamespace()
    parent.child, child.parent, parent.lock = child, parent, threading.Lock()

    assert culprit(parent) == "argument.lock"


def test_error_is_reported_for_what_is_nested_too_deeply_to_be_searched() -> None:
    value: list[Any] = []
    for _ in range(5000):
        value = [value]

    assert culprit(value).startswith("argument[0][0][0]")


def test_object_whose_parts_all_pickle_is_the_culprit_itself() -> None:
    assert culprit([Future()]) == "argument[0]"


# the limit


@pytest.mark.parametrize("value", [b"x" * 2000, [lambda: b"x" * 2000, b"x" * 2000]])
def test_payload_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    monkeypatch.setattr(pickling, "PAYLOAD_LIMIT_BYTES", 1000)

    with pytest.raises(PayloadTooLargeError, match=r"argument takes [\d,]+ bytes, the limit is 1,000"):
        dump(value)


def test_payload_within_the_limit_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickling, "PAYLOAD_LIMIT_BYTES", 1000)

    assert len(dump(b"x" * 900)) < 1000
