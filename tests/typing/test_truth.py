"""What the type checkers believe is true: the files that they have checked are run, on real replicas."""

import types
from collections.abc import Callable
from typing import Any, TypeVar, get_args, get_origin

import pytest

from tests.replica_helpers import Serving
from tests.typing import decorated, methods, undecorated

T = TypeVar("T")


@pytest.fixture(autouse=True)
def assert_type_looks_at_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (decorated, methods, undecorated):
        monkeypatch.setattr(module, "assert_type", assert_is)


def assert_is(value: T, kind: Any) -> T:
    assert is_a(value, kind), f"{value!r} is no {kind}"
    return value


def is_a(value: Any, kind: Any) -> bool:
    """`isinstance` for what stands in annotations; of generics, only lists and tuples are looked into."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        return any(is_a(value, one) for one in arguments)
    if origin is list:
        return isinstance(value, list) and all(is_a(item, arguments[0]) for item in value)
    if origin is tuple:
        return isinstance(value, tuple) and all(map(is_a, value, arguments))
    return kind is Any or isinstance(value, origin or kind)


def test_a_wrong_type_is_noticed() -> None:
    assert is_a([1, None], list[int | None]) and is_a(("x", 1.0), tuple[str, float])
    assert not is_a(["1"], list[int]) and not is_a((1, 1.0), tuple[str, float]) and not is_a(1, str)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "check", [undecorated.calls, undecorated.refs, undecorated.arguments, undecorated.many], ids=lambda f: f.__name__
)
async def test_classes(serving: Serving, check: Callable[..., Any]) -> None:
    await check(serving(undecorated.Greeter), serving(undecorated.Square))


@pytest.mark.anyio
async def test_streams_functions_and_methods(serving: Serving) -> None:
    await undecorated.streams(serving(undecorated.Count), serving(undecorated.Letters))
    await undecorated.functions(serving(undecorated.greet), serving(undecorated.double))
    await undecorated.methods(serving(undecorated.Square))


@pytest.mark.anyio
async def test_batched_and_multiplexed_methods(serving: Serving) -> None:
    lengths = serving(undecorated.Lengths)

    await undecorated.batches(lengths)

    assert await lengths.itself.call("abc") == "abc"
    assert await serving(undecorated.Loader).call() == 1


@pytest.mark.anyio
async def test_handles_of_nobody_knows_what(serving: Serving) -> None:
    await undecorated.unknown(serving(undecorated.Square))
    await undecorated.unknown_streams(serving(undecorated.Count))


def test_blocking_handles(serving: Serving) -> None:
    greeter, square = serving.sync(undecorated.Greeter), serving.sync(undecorated.Square)

    undecorated.blocking(greeter, square, serving.sync(undecorated.Count))
    undecorated.unknown_blocking(square)
    methods.blocking(serving.sync(methods.Model.func_or_class))


@pytest.mark.anyio
@pytest.mark.parametrize(
    "check",
    [decorated.calls, decorated.functions, methods.calls, methods.streams, methods.batches, methods.graphs],
    ids=lambda f: f"{f.__module__.rpartition('.')[2]}.{f.__name__}",
)
async def test_graphs(serving: Serving, check: Callable[..., Any]) -> None:
    await check(serving.graph)


def test_deployments() -> None:
    undecorated.deployments()
    decorated.deployments()
    methods.deployments()
