"""Streaming as Ray Serve 2.7 and later have it: `options(stream=True)`, and what is refused."""

# mypy: disable-error-code="attr-defined"

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from millstream import serve
from millstream.errors import RefNotFoundError, RequestCancelledError, SerializationError, TaskError
from millstream.handles.ref import ObjectRef
from tests.ray_code.conftest import Run

UNAWAITED = "ignore:coroutine .* was never awaited"


@serve.deployment(max_ongoing_requests=10)
class Model:
    async def count(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    def count_sync(self, n: int) -> Iterator[int]:
        yield from range(n)

    async def fail_after(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i
        raise KeyError("late")

    async def for_ever(self) -> AsyncIterator[int]:
        while True:
            yield 1
            await asyncio.sleep(0.001)

    async def plain(self, x: Any = None) -> Any:
        return x


@pytest.mark.parametrize("method", ["count", "count_sync"])
def test_items_are_read_by_for_and_by_async_for(run: Run, method: str) -> None:
    handle = run(Model.bind()).options(method_name=method, stream=True)
    stream: Any = handle.remote(3)

    assert list(stream) == [0, 1, 2]

    async def go() -> list[int]:
        return [item async for item in serve.get_app_handle().options(method_name=method, stream=True).remote(3)]

    assert asyncio.run(go()) == [0, 1, 2]


def test_stream_is_not_awaited_and_has_no_result(run: Run) -> None:
    handle = run(Model.bind()).count.options(stream=True)

    with pytest.raises(TypeError, match="no single result: iterate over it"):
        handle.remote(1).result()

    async def go() -> None:
        await serve.get_app_handle().count.options(stream=True).remote(1)

    with pytest.raises(TypeError, match="`async for item in stream`"):
        asyncio.run(go())


def test_generator_called_without_stream_is_a_type_error_that_says_how(run: Run) -> None:
    with pytest.raises(TypeError, match="stream") as raised:
        run(Model.bind()).count.call(3)
    assert isinstance(raised.value, TaskError)


def test_stream_of_what_is_no_generator_is_a_type_error_that_says_how(run: Run) -> None:
    with pytest.raises(TypeError, match="stream") as raised:
        list(run(Model.bind()).plain.stream())
    assert isinstance(raised.value, TaskError)


def test_error_comes_after_the_items_before_it(run: Run) -> None:
    stream = run(Model.bind()).fail_after.stream(2)

    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(KeyError, match="late"):
        next(stream)


def test_closing_a_stream_cancels_its_request(run: Run) -> None:
    stream = run(Model.bind()).for_ever.stream()
    ref = ObjectRef.from_id(stream.ref_id)

    assert next(stream) == 1
    stream.close()

    with pytest.raises((RequestCancelledError, RefNotFoundError)):
        ref.result(10)


def test_stream_cannot_be_an_argument(run: Run) -> None:
    handle = run(Model.bind())
    stream = handle.for_ever.stream()

    with pytest.raises(SerializationError):
        handle.plain.call(stream)
    stream.close()
