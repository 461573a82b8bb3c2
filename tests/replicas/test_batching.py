"""`serve.batch` as a decorator: its settings, the arguments it passes on, and what it is to a replica and to pickle."""

import asyncio
import inspect
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from millstream import serve
from millstream.broker.definitions import has_async_methods
from millstream.errors import ConfigError, MillstreamError
from millstream.replicas import batch_queue
from millstream.replicas.loader import Served
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Stage
from tests.replicas.batched import NEVER_S, Model, Slotted, passes, start, together

pytestmark = pytest.mark.anyio


# the decorator


def decorate(**options: Any) -> Any:
    @serve.batch(**options)
    async def function(xs: list[Any]) -> list[Any]:
        return xs

    return function


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_size": 1.0},
        {"batch_wait_timeout_s": 0},
        {"batch_wait_timeout_s": 0.0},
        {"batch_wait_timeout_s": 1.5, "max_batch_size": 10},
        {"max_concurrent_batches": 3, "batch_size_fn": len},
    ],
)
def test_settings_that_are_taken(options: dict[str, Any]) -> None:
    assert callable(decorate(**options))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_batch_size": 1.1}, TypeError),
        ({"max_batch_size": "1"}, TypeError),
        ({"max_batch_size": None}, TypeError),
        ({"max_batch_size": 0}, ConfigError),
        ({"max_batch_size": -1}, ConfigError),
        ({"batch_wait_timeout_s": "a"}, TypeError),
        ({"batch_wait_timeout_s": -0.1}, ConfigError),
        ({"batch_wait_timeout_s": float("nan")}, ConfigError),
        ({"max_concurrent_batches": 1.5}, TypeError),
        ({"max_concurrent_batches": 0}, ConfigError),
        ({"batch_size_fn": 5}, TypeError),
    ],
)
def test_setting_that_makes_no_sense_is_refused_by_name(options: dict[str, Any], error: type[Exception]) -> None:
    (name,) = options
    with pytest.raises(error, match=f"^{name}="):
        decorate(**options)


@pytest.mark.parametrize("target", [lambda xs: xs, len, 5, "x", type("C", (), {})])
@pytest.mark.parametrize("options", [None, {"max_batch_size": 2}])
def test_only_async_functions_can_be_batched(target: Any, options: dict[str, Any] | None) -> None:
    with pytest.raises(TypeError, match="async def"):
        serve.batch(target) if options is None else serve.batch(**options)(target)


@pytest.mark.parametrize("name", ["when_full", "soon"])
def test_batched_method_runs_on_the_loop_in_a_task_of_its_own(name: str) -> None:
    method = Served(Model(), "app.Model").method(name.encode())

    assert (method.is_async, method.is_prompt) == (True, False)


def test_batched_function_can_be_deployed() -> None:
    function = decorate()

    method = Served(function, "app.f").method(b"__call__")

    assert (method.is_async, method.is_prompt) == (True, False)
    assert has_async_methods(function)
    assert serve.deployment(function).name == "function"


class Generator:
    @serve.batch
    async def run(self, xs: list[int]) -> AsyncIterator[list[int]]:
        yield xs


def test_batched_generator_is_seen_as_one() -> None:
    assert inspect.isasyncgenfunction(Generator().run) and inspect.isasyncgenfunction(Generator.run)
    assert not Served(Generator(), "app.Generator").method(b"run").is_prompt


def test_class_whose_only_async_method_is_batched_is_asynchronous() -> None:
    class Coroutine:
        @serve.batch
        async def run(self, xs: list[int]) -> list[int]:
            return xs

    assert has_async_methods(Coroutine) and has_async_methods(Generator)


def test_method_looks_like_the_one_it_was() -> None:
    assert (Model().when_full.__name__, Model.when_full.__doc__) == ("when_full", "Only full batches.")
    assert repr(Model().when_full) == "<serve.batch of Model.when_full>"


# arguments


async def takes_many(a: Any, /, b: Any, *more: Any, c: Any = 0, **others: Any) -> list[Any]:
    assert isinstance(a, list)
    return [(a, b, more, c, others)] * len(a)


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([((1, 2), {}), ((3, 4), {})], ([1, 3], [2, 4], (), 0, {})),
        ([((1,), {"b": 2}), ((3, 4), {})], ([1, 3], [2, 4], (), 0, {})),
        ([((1, 2), {"c": 5}), ((3, 4), {})], ([1, 3], [2, 4], (), [5, 0], {})),
        ([((1, 2, 3), {}), ((4, 5, 6), {})], ([1, 4], [2, 5], ([3, 6],), 0, {})),
        ([((1, 2), {"z": 3}), ((4, 5), {"z": 6})], ([1, 4], [2, 5], (), 0, {"z": [3, 6]})),
    ],
)
async def test_each_parameter_becomes_a_list(calls: Any, expected: Any) -> None:
    function = serve.batch(max_batch_size=2, batch_wait_timeout_s=NEVER_S)(takes_many)

    seen = await together(*(function(*args, **kwargs) for args, kwargs in calls))

    assert seen == [expected] * 2


async def test_parameter_after_one_that_nobody_gives_is_named() -> None:
    @serve.batch(max_batch_size=2, batch_wait_timeout_s=NEVER_S)
    async def function(xs: Any, scale: int = 2, shift: Any = 0) -> list[Any]:
        return [x * scale + s for x, s in zip(xs, shift, strict=True)]

    assert await together(function(1, shift=1), function(2)) == [3, 4]


@pytest.mark.parametrize("calls", [[((1, 2, 3), {}), ((1, 2), {})], [((1, 2), {"y": 1}), ((1, 2), {"z": 1})]])
async def test_calls_that_differ_in_what_they_give_cannot_be_one_batch(calls: Any) -> None:
    function = serve.batch(max_batch_size=2, batch_wait_timeout_s=NEVER_S)(takes_many)

    outcomes = await asyncio.gather(*(function(*args, **kwargs) for args, kwargs in calls), return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [MillstreamError] * 2


async def test_call_with_wrong_arguments_fails_alone() -> None:
    model = Model()

    wrong = [model.soon(), model.soon(1, 2), model.soon(ys=1)]
    *errors, right = await asyncio.gather(*wrong, model.soon(1), return_exceptions=True)

    assert [type(error) for error in errors] == [TypeError] * 3
    assert right == 10 and model.batches == [[1]]


# setters


async def test_setters_are_for_one_instance() -> None:
    one, other = Model(), Model()
    one.when_full.set_max_batch_size(2.0)  # type: ignore[arg-type]

    await together(*(one.when_full(x) for x in range(2)), *(other.when_full(x) for x in range(3)))

    assert (one.batches, other.batches) == ([[0, 1]], [[0, 1, 2]])


async def test_wait_can_be_set() -> None:
    model = Model()
    model.when_full.set_batch_wait_timeout_s(0)

    assert await model.when_full(1) == 10


async def test_batch_that_calls_wait_for_keeps_the_settings_it_began_with() -> None:
    model = Model()
    calls = start(model.when_full(1), model.when_full(2))
    await passes()

    model.when_full.set_max_batch_size(1)
    model.when_full.set_batch_wait_timeout_s(0)
    await passes()
    assert model.batches == []
    await together(*calls, model.when_full(3))
    await model.when_full(4)

    assert model.batches == [[1, 2, 3], [4]]


async def test_settings_of_a_function_can_be_set() -> None:
    function = decorate(max_batch_size=2, batch_wait_timeout_s=NEVER_S)
    function.set_max_batch_size(1)

    assert await function(1) == 1


def test_setters_refuse_what_the_decorator_refuses() -> None:
    model = Model()

    with pytest.raises(ValueError):
        model.soon.set_max_batch_size(0)
    with pytest.raises(TypeError):
        model.soon.set_max_batch_size(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        model.soon.set_batch_wait_timeout_s(-1)
    with pytest.raises(TypeError):
        model.soon.set_batch_wait_timeout_s("1")  # type: ignore[arg-type]


# in a replica


class Embed:
    def __init__(self) -> None:
        self.batches: list[int] = []

    def reconfigure(self, size: int) -> None:
        self.embed.set_max_batch_size(size)

    @serve.batch(max_batch_size=10, batch_wait_timeout_s=NEVER_S)
    async def embed(self, xs: list[int]) -> list[int]:
        self.batches.append(len(xs))
        return [x * 2 for x in xs]

    async def __call__(self, x: int) -> int:
        value: int = await self.embed(x)
        return value

    async def seen(self) -> list[int]:
        return self.batches


@pytest.mark.parametrize("method", ["__call__", "embed"])
async def test_requests_of_a_replica_arrive_in_batches(stage: Stage, method: str) -> None:
    await stage.start(Embed)

    values = await together(*(stage.handle.options(method_name=method).call(x) for x in range(20)))

    assert values == [x * 2 for x in range(20)]
    assert await stage.handle.seen.call() == [10, 10]


async def test_batched_function_is_served(stage: Stage) -> None:
    @serve.batch(max_batch_size=10, batch_wait_timeout_s=NEVER_S)
    async def double(xs: list[int]) -> list[tuple[int, int]]:
        return [(2 * x, len(xs)) for x in xs]

    await stage.start(double)

    assert await together(*(stage.handle.call(x) for x in range(20))) == [(2 * x, 10) for x in range(20)]


async def test_size_from_user_config(stage: Stage) -> None:
    await stage.start(Embed, user_config=4)

    await together(*(stage.handle.call(x) for x in range(8)))

    assert await stage.handle.seen.call() == [4, 4]


async def test_batch_that_can_never_be_full_is_warned_of_once(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    class Small(Model):
        @serve.batch(max_batch_size=5, batch_wait_timeout_s=0, max_concurrent_batches=2)
        async def run(self, xs: list[Any]) -> list[Any]:
            return xs

    with caplog.at_level(logging.WARNING, "millstream.replica"):
        await stage.start(Small, max_ongoing_requests=9)
        for x in range(3):
            assert await stage.handle.run.call(x) == x

    (warned,) = [message for message in caplog.messages if "never full" in message]
    assert "max_ongoing_requests=9 of app.Model is below max_batch_size=5 * max_concurrent_batches=2" in warned


# loops


def test_instance_without_a_dict_has_no_settings_of_its_own() -> None:
    with pytest.raises(TypeError, match=r"Slotted has no __dict__ .* add '__dict__'"):
        Slotted().run.set_max_batch_size(1)


def test_one_instance_serves_one_loop_after_the_other() -> None:
    model = Model()

    async def both() -> Any:
        return await together(model.soon(1), model.soon(2))

    assert [asyncio.run(both()) for _ in range(3)] == [[10, 20]] * 3
    assert batch_queue._queues == {}


def test_loop_that_ends_takes_waiting_calls_and_running_batches_along(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(Gate())

    async def leave() -> None:
        start(*(model.when_full(x) for x in range(4)))
        await wait_until(lambda: model.batches == [[0, 1, 2]])

    asyncio.run(leave())

    assert batch_queue._queues == {} and model.batches == [[0, 1, 2]] and caplog.text == ""


# pickling


def test_class_of_a_script_travels_with_its_parameters_only(tmp_path: Path) -> None:
    script = """
import asyncio, sys
from millstream import serve
from millstream.broker import pickling

class Model:
    @serve.batch(max_batch_size=3, batch_wait_timeout_s=1000)
    async def run(self, xs):
        return [len(xs)] * len(xs)

    @serve.batch(max_batch_size=2, batch_wait_timeout_s=1000)
    async def stream(self, xs):
        yield xs

    @serve.multiplexed(max_num_models_per_replica=1)
    async def load(self, model_id):
        return model_id

@serve.batch(max_batch_size=1)
async def function(xs):
    return xs

async def use():
    model = Model()
    await asyncio.gather(*map(model.run, range(3)))
    await model.load("a")
    await function(1)
    return model

model = asyncio.run(use())
sys.stdout.buffer.write(pickling.dump((Model, function, model), "it"))
"""
    (tmp_path / "script.py").write_text(script)
    body = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, check=True).stdout
    # A process where the script's `__main__` is somebody else's, as in a replica.
    reader = """
import asyncio, pickle, sys
Model, function, model = pickle.load(sys.stdin.buffer)

async def use(model):
    streams = [model.stream(x) for x in range(2)]
    return (
        await asyncio.gather(*map(model.run, range(3))), await model.load("b"), await function(5),
        [[x async for x in stream] for stream in streams],
    )

print(asyncio.run(use(Model())), asyncio.run(use(model)))
"""

    read = subprocess.run([sys.executable, "-c", reader], input=body, cwd=tmp_path, capture_output=True, check=True)

    expected = "([3, 3, 3], 'b', 5, [[0], [1]])"
    assert read.stdout.decode() == f"{expected} {expected}\n"
