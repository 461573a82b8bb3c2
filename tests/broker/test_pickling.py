"""Bytes out of values: plain pickle first, by value where a name would not be found, and a named culprit."""

import pickle
import pickletools
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from millstream.broker import pickling
from millstream.broker.pickling import Pickled
from millstream.errors import ConfigError, PayloadTooLargeError, SerializationError


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


@dataclass
class Block:
    """What a library with large arrays does: its bytes lie beside the pickle, if they are many."""

    data: bytes | bytearray

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return Block, (pickle.PickleBuffer(self.data),)


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


def dump_in_main(code: str, how: str = "dump") -> bytes:
    """Run a script that puts something into `result`; that, pickled in there."""
    program = f"""{textwrap.dedent(code)}
import pickle, sys
from millstream.broker import pickling
dumped = pickling.{how}(result, what="argument")
if not isinstance(dumped, bytes):  # in parts: for a reader that does not know of such
    dumped = pickle.dumps((dumped.data, [bytes(buffer) for buffer in dumped.buffers]))
sys.stdout.buffer.write(dumped)
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=20).stdout


def load_elsewhere(data: bytes, expression: str) -> str:
    """What `expression` over the unpickled `value` prints in a process with another `__main__`."""
    program = f"""
import pickle, sys
value = pickle.loads(sys.stdin.buffer.read())
if isinstance(value, tuple):
    value = pickle.loads(value[0], buffers=value[1])
print({expression})
"""
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


def test_code_that_travels_by_value_says_which_file_it_is_from() -> None:
    def here() -> Any:
        return lambda: None

    there = pickling.load(pickling.dump(here, "a function"))

    assert there.__code__.co_filename == there().__code__.co_filename == __file__
    assert pickling.dump(there, "it") == pickling.dump(there, "it again")


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


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the limit as an operator does."""

    def set_limit(text: str) -> None:
        monkeypatch.setenv("MILLSTREAM_PAYLOAD_LIMIT", text)
        pickling.limit_bytes.cache_clear()

    yield set_limit
    monkeypatch.undo()
    pickling.limit_bytes.cache_clear()


Limit = Callable[[str], None]


@pytest.mark.parametrize("value", [b"x" * 80_000, [lambda: b"x" * 2000, b"x" * 80_000]])
def test_payload_over_the_limit_is_refused(limit: Limit, value: Any) -> None:
    limit("70000")

    with pytest.raises(PayloadTooLargeError, match=r"argument takes [\d,]+ bytes, the limit is 70,000"):
        dump(value)


def test_payload_within_the_limit_is_not(limit: Limit) -> None:
    limit("70000")

    assert len(dump(b"x" * 69_000)) < 70_000


@pytest.mark.parametrize("value", [b"x" * 200_000, [Block(b"x" * 70_000), Block(b"x" * 70_000)]])
def test_parts_over_the_limit_are_refused_by_their_sum_and_told_how_to_raise_it(limit: Limit, value: Any) -> None:
    limit("130000")

    with pytest.raises(PayloadTooLargeError, match=r"the limit is 130,000.*MILLSTREAM_PAYLOAD_LIMIT"):
        pickling.dump_parts(value, what="argument")

    limit("300000")
    assert isinstance(pickling.dump_parts(value, what="argument"), Pickled)


def test_limit_leaves_room_for_the_envelope_in_the_largest_string_that_a_server_takes(limit: Limit) -> None:
    limit("")

    at_most_buffers = pickling.limit_bytes() // pickling.LARGE_BYTES
    assert pickling.limit_bytes() == 512_000_000
    assert pickling.limit_bytes() + 18 + 4 + 8 * at_most_buffers < 512 * 1024 * 1024


@pytest.mark.parametrize("text", ["0", "-1", "1e6", "64 kB", "²", "lots"])
def test_limit_that_is_no_number_of_bytes_is_refused_by_name(limit: Limit, text: str) -> None:
    limit(text)

    with pytest.raises(ConfigError, match=f"MILLSTREAM_PAYLOAD_LIMIT={text!r}"):
        dump("x")


# in parts


def test_small_value_is_one_piece() -> None:
    for value in ({"a": [1, 2]}, Block(b"x" * 1000), lambda: 7, b"x" * (pickling.LARGE_BYTES - 100)):
        assert isinstance(pickling.dump_parts(value, what="argument"), bytes)


def test_large_value_without_buffers_is_one_large_piece() -> None:
    pickled = pickling.dump_parts(b"x" * 100_000, what="argument")

    assert isinstance(pickled, Pickled)
    assert (pickled.buffers, pickled.size_bytes) == ([], len(pickled.data))
    assert pickling.load(pickled.data) == b"x" * 100_000


def test_large_buffers_lie_beside_and_small_ones_do_not() -> None:
    value = [Block(b"a" * 70_000), Block(b"few"), Block(b"b" * 80_000)]

    pickled = pickling.dump_parts(value, what="argument")

    assert isinstance(pickled, Pickled)
    assert [bytes(buffer[:1]) * len(buffer) for buffer in pickled.buffers] == [b"a" * 70_000, b"b" * 80_000]
    assert len(pickled.data) < 1000
    assert pickling.load(pickled.data, buffers=pickled.buffers) == value


def test_culprit_beside_a_large_buffer_is_named() -> None:
    with pytest.raises(SerializationError) as caught:
        pickling.dump_parts([Block(b"x" * 100_000), {"model": Guarded()}], what="argument")

    assert caught.value.path == "argument[1]['model'].lock"


def test_what_main_defines_travels_by_value_beside_a_large_buffer() -> None:
    data = dump_in_main(
        """
        from tests.broker.test_pickling import Block
        class Adder:
            def add(self): return 42
        result = [Adder(), Block(b"x" * 100_000)]
        """,
        "dump_parts",
    )

    assert load_elsewhere(data, "value[0].add(), len(value[1].data)") == "42 100000"
