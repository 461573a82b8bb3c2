"""From a class or function to methods that can be called: which there are, and how each of them runs."""

import asyncio
import functools
from collections.abc import AsyncIterator
from typing import Any

import pytest

from millstream.broker.definitions import ASYNC_ONGOING, Definition
from millstream.config import DeploymentConfig
from millstream.errors import MillstreamError
from millstream.replicas.loader import Served, build


async def nothing() -> None:
    pass


class Context:
    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        pass


async def numbers() -> AsyncIterator[int]:
    yield 1


# which of these can suspend


class Prompt:
    async def returns(self, x: int) -> int:
        return x + 1

    async def raises(self) -> None:
        raise ValueError

    async def starts_others(self) -> None:
        task = asyncio.ensure_future(nothing())
        task.cancel()

    async def loops(self, xs: list[int]) -> list[int]:
        return [x for x in xs if x]

    @staticmethod
    async def static() -> int:
        return 1

    @classmethod
    async def of_class(cls) -> int:
        return 1


class Suspends:
    async def awaits(self) -> None:
        await nothing()

    async def awaits_in_a_branch(self, x: bool) -> None:
        if x:
            return
        await nothing()

    async def iterates(self) -> None:
        async for _ in numbers():
            pass

    async def enters(self) -> None:
        async with Context():
            pass

    async def comprehends(self) -> list[int]:
        return [x async for x in numbers()]

    async def awaits_in_a_comprehension(self) -> list[int]:
        return [await asyncio.sleep(0, x) for x in range(2)]

    async def uses_a_timeout(self) -> None:
        async with asyncio.timeout(1):  # noqa: ASYNC100 - entering it is what counts here
            pass


class InThread:
    def computes(self) -> int:
        return 1

    @staticmethod
    def static() -> int:
        return 1

    @functools.cache  # noqa: B019 - one instance per replica
    def cached(self) -> int:
        return 1

    lambda_ = staticmethod(lambda: 1)


def methods_of(cls: type) -> list[str]:
    return [name for name in vars(cls) if not name.startswith("__")]


@pytest.mark.parametrize(
    ("cls", "name", "is_async", "is_prompt"),
    [(Prompt, name, True, True) for name in methods_of(Prompt)]
    + [(Suspends, name, True, False) for name in methods_of(Suspends)]
    + [(InThread, name, False, False) for name in methods_of(InThread)],
)
def test_how_a_method_runs(cls: type, name: str, is_async: bool, is_prompt: bool) -> None:
    method = Served(cls(), "app.Model").method(name.encode())

    assert (method.is_async, method.is_prompt) == (is_async, is_prompt)


def test_instance_is_called_by_its_call_method() -> None:
    class Callable:
        async def __call__(self) -> int:
            return 1

    method = Served(Callable(), "app.Model").method(b"__call__")

    assert method.is_async and method.is_prompt


@pytest.mark.parametrize(("function", "is_async"), [(nothing, True), (len, False), (lambda x: x, False)])
def test_function_is_its_own_call_method(function: Any, is_async: bool) -> None:
    served = Served(function, "app.Model")

    method = served.method(b"__call__")

    assert method.function is function and method.is_async is is_async
    assert served.public_methods() == ["__call__"]


def test_partial_of_an_async_function_is_async() -> None:
    async def add(a: int, b: int) -> int:
        return a + b

    class Holds:
        def __init__(self) -> None:
            self.add_one = functools.partial(add, 1)

    assert Served(Holds(), "app.Model").method(b"add_one").is_async


def test_method_is_looked_up_once() -> None:
    served = Served(Prompt(), "app.Model")

    assert served.method(b"returns") is served.method(b"returns")


@pytest.mark.parametrize("name", ["missing", "__init__", "__call__", "__dict__", "constant", ""])
def test_what_is_no_method_is_refused_with_those_there_are(name: str) -> None:
    class Model:
        constant = 3

        def predict(self) -> int:
            return 1

        def _helper(self) -> int:
            return 1

    with pytest.raises(MillstreamError) as caught:
        Served(Model(), "app.Model").method(name.encode())

    assert str(caught.value) == f"app.Model has no method {name!r}; available methods: _helper, predict"


def test_properties_are_not_looked_at() -> None:
    class Model:
        def predict(self) -> int:
            return 1

        @property
        def weights(self) -> int:
            raise AssertionError("looked at")

        @functools.cached_property
        def cached(self) -> int:
            raise AssertionError("looked at")

    served = Served(Model(), "app.Model")

    assert served.public_methods() == ["predict"]
    assert served.max_ongoing(DeploymentConfig()) == 1


# how many at once


@pytest.mark.parametrize(
    ("target", "config", "expected"),
    [
        (Prompt(), DeploymentConfig(), ASYNC_ONGOING),
        (InThread(), DeploymentConfig(), 1),
        (InThread(), DeploymentConfig(sync_threads=4), 4),
        (InThread(), DeploymentConfig(sync_threads=4, max_ongoing_requests=9), 9),
        (Prompt(), DeploymentConfig(max_ongoing_requests=2), 2),
        (nothing, DeploymentConfig(), ASYNC_ONGOING),
    ],
)
def test_how_many_run_at_once(target: Any, config: DeploymentConfig, expected: int) -> None:
    assert Served(target, "app.Model").max_ongoing(config) == expected


def test_private_async_methods_do_not_count() -> None:
    class Model:
        def predict(self) -> int:
            return 1

        async def _load(self) -> None:
            pass

    assert Served(Model(), "app.Model").max_ongoing(DeploymentConfig()) == 1


# construction


class Plain:
    def __init__(self, a: int, b: int = 2) -> None:
        self.sum = a + b


class Loads:
    async def __init__(self, a: int) -> None:  # type: ignore[misc]
        await asyncio.sleep(0)
        self.sum = a


class Refuses:
    def __init__(self) -> None:
        raise OSError("no GPU")


@pytest.mark.anyio
async def test_instance_is_constructed_with_its_arguments() -> None:
    plain = await build(Definition(Plain, (1,), {"b": 3}), "app.Model")
    loads = await build(Definition(Loads, (5,), {}), "app.Model")

    assert (plain.instance.sum, loads.instance.sum) == (4, 5)


@pytest.mark.anyio
async def test_function_is_served_as_it_is() -> None:
    assert (await build(Definition(nothing, (), {}), "app.Model")).instance is nothing


@pytest.mark.anyio
async def test_error_of_a_constructor_is_raised_as_it_is() -> None:
    with pytest.raises(OSError, match="no GPU"):
        await build(Definition(Refuses, (), {}), "app.Model")
