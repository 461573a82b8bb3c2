"""What every type checker says without help: the types of results. Checked by mypy (with and without our plugin) and by
pyright; then run, to see that it is true.

The classes are not decorated, so their names are types: `serve.deployment(Greeter)` makes the deployment.
"""

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Protocol, assert_type

import millstream
from millstream import DeploymentHandle, ObjectRef, SyncHandle, serve
from millstream.handles.arguments import RefTask
from millstream.handles.streaming import AsyncStream, Stream


class Greeter:
    """Asynchronous."""

    async def __call__(self, name: str, mark: str = ".") -> str:
        return f"hello {name}{mark}"


class Square:
    """Synchronous."""

    def __call__(self, x: int) -> int:
        return x * x

    def half(self, x: int) -> float:
        return x / 2


class Count:
    async def __call__(self, to: int) -> AsyncIterator[int]:
        for x in range(to):
            yield x


class Letters:
    def __call__(self, word: str) -> Iterator[str]:
        yield from word


class Lengths:
    @serve.batch
    async def __call__(self, texts: list[str]) -> list[int]:
        return [len(text) for text in texts]

    @serve.batch(max_batch_size=2)
    async def halves(self, numbers: list[int], signs: list[int] | None = None) -> tuple[float, ...]:
        return tuple(number / 2 for number in numbers)

    @serve.batch
    async def counts(self, upto: list[int]) -> AsyncIterator[list[int | type[StopIteration]]]:
        for x in range(max(upto)):
            yield [x if x < to else StopIteration for to in upto]

    async def itself(self, text: str) -> str:
        assert_type(await self(text), int)
        assert_type(await self.halves(3), float)
        async for item in self.counts(3):
            assert_type(item, int | type[StopIteration])
        self.halves.set_max_batch_size(3)
        return text


class Loader:
    @serve.multiplexed(max_num_models_per_replica=2)
    async def model(self, model_id: str) -> dict[str, int]:
        return {model_id: 1}

    @serve.multiplexed
    async def other(self, model_id: str) -> float:
        return 1.5

    async def __call__(self) -> int:
        assert_type(await self.other("a"), float)
        models = assert_type(await self.model("a"), dict[str, int])
        return models["a"]


async def greet(name: str) -> str:
    return f"hello {name}"


def double(x: int) -> int:
    return 2 * x


async def calls(greeter: DeploymentHandle[Greeter], square: DeploymentHandle[Square]) -> None:
    assert_type(await greeter.call("Ada"), str)
    assert_type(await greeter.call("Ada", mark="!"), str)
    assert_type(await square.call(3), int)
    assert_type(await greeter.options(priority="high").call("Ada"), str)
    text, nine = await asyncio.gather(greeter.call("Ada"), square.call(3))
    assert_type(text, str)
    assert_type(nine, int)


async def refs(greeter: DeploymentHandle[Greeter], square: DeploymentHandle[Square]) -> None:
    task = assert_type(greeter.remote("Ada"), RefTask[str])
    ref = assert_type(await task, ObjectRef[str])
    assert_type(await ref, str)
    assert_type(await (await square.remote(3)), int)
    assert_type(ref.result(timeout=5), str)
    assert_type(ref.future(), concurrent.futures.Future[str])
    assert_type(await asyncio.gather(*[await square.remote(x) for x in range(3)]), list[int])
    assert_type(await asyncio.wait_for(ref, 5), str)
    assert_type(await ObjectRef[str].from_id(ref.id), str)
    assert_type(ObjectRef.from_id(ref.id), ObjectRef[Any])


async def arguments(greeter: DeploymentHandle[Greeter], square: DeploymentHandle[Square]) -> None:
    """A ref, or a call that is not awaited, stands for its value."""
    assert_type(await greeter.call(greeter.remote("Ada")), str)
    assert_type(await square.call(square.remote(square.remote(2))), int)
    assert_type(await greeter.call(await greeter.remote("Ada"), mark=greeter.remote("")), str)


async def many(greeter: DeploymentHandle[Greeter], square: DeploymentHandle[Square]) -> None:
    assert_type([text async for text in greeter.map(["Ada", "Eve"])], list[str])
    assert_type([x async for x in square.map(range(3), ordered=False, max_in_flight=2)], list[int])
    assert_type([x async for x in square.map([square.remote(2), 3])], list[int])
    assert_type([x async for x in square.map([2, 3], return_exceptions=True)], list[int | Exception])
    assert_type([text async for text in greeter.starmap([("Ada", "!"), ["Eve"]], max_in_flight=2)], list[str])
    assert_type([x async for x in square.starmap([[2], "no"], return_exceptions=True)], list[int | Exception])


async def streams(count: DeploymentHandle[Count], letters: DeploymentHandle[Letters]) -> None:
    assert_type(count.stream(3), AsyncStream[int])
    assert_type([x async for x in count.stream(3)], list[int])
    assert_type([x async for x in letters.stream("abc")], list[str])
    assert_type([x async for x in count.options(stream=True).remote(3)], list[int])


async def batches(lengths: DeploymentHandle[Lengths]) -> None:
    """Called with one value for each list, and answered with one."""
    assert_type(await lengths.call("abc"), int)
    assert_type([length async for length in lengths.map(["a", "bc"])], list[int])
    assert_type([one async for one in lengths.map(["a"], return_exceptions=True)], list[int | Exception])


async def functions(
    greet: DeploymentHandle[Callable[[str], Coroutine[Any, Any, str]]], double: DeploymentHandle[Callable[[int], int]]
) -> None:
    assert_type(await greet.call("Ada"), str)
    assert_type(await double.call(3), int)


class Half(Protocol):
    def __call__(self, x: int) -> float: ...


async def methods(square: DeploymentHandle[Square]) -> None:
    """Without the plugin a method is not looked up; an annotation says what it is."""
    half: DeploymentHandle[Half] = square.half
    assert_type(await half.call(3), float)
    assert_type([x async for x in half.map([1, 2])], list[float])


async def unknown(handle: DeploymentHandle) -> None:
    """A handle of nobody knows what can do everything, and so can the handles of its methods."""
    assert_type(handle, DeploymentHandle[Any])
    assert_type(await handle.call(3), Any)
    assert_type(await (await handle.remote(3)), Any)
    assert_type(await handle.half.call(handle.remote(3)), Any)
    assert_type([x async for x in handle.map([1, 2])], list[Any])
    assert_type([x async for x in handle.starmap([[1]])], list[Any])
    assert_type(await handle.options(method_name="half").call(3), Any)


async def unknown_streams(handle: DeploymentHandle) -> None:
    """Ray's way: `remote` of a handle with stream=True gives the items."""
    assert_type([x async for x in handle.stream(3)], list[Any])
    assert_type([x async for x in handle.options(stream=True).remote(3)], list[Any])
    streaming = handle.options(stream=True)
    assert_type([x async for x in streaming.options(max_ahead=3).remote(3)], list[Any])


def blocking(greeter: SyncHandle[Greeter], square: SyncHandle[Square], count: SyncHandle[Count]) -> None:
    assert_type(greeter.call("Ada"), str)
    assert_type(square.call(square.remote(3)), int)
    ref = assert_type(greeter.remote("Ada"), ObjectRef[str])
    assert_type(ref.result(), str)
    assert_type(list(square.map([1, 2])), list[int])
    assert_type(list(greeter.map(["Ada"], return_exceptions=True)), list[str | Exception])
    assert_type(list(greeter.starmap([("Ada", "!")])), list[str])
    assert_type(count.stream(3), Stream[int])
    assert_type(list(count.stream(3)), list[int])
    assert_type(list(count.options(stream=True).remote(3)), list[int])
    assert_type(millstream.get(ref), str)
    assert_type(millstream.get([ref, greeter.remote("Eve")], timeout=5), list[str])
    assert_type(millstream.wait([ref]), tuple[list[ObjectRef[str]], list[ObjectRef[str]]])
    assert_type(millstream.put(3), ObjectRef[int])
    assert_type(greeter.call(millstream.put("Ada")), str)


def unknown_blocking(handle: SyncHandle) -> None:
    assert_type(handle.call(3), Any)
    assert_type(handle.half.remote(3), ObjectRef[Any])
    assert_type(millstream.get([handle.remote(3)]), list[Any])


def deployments() -> None:
    assert_type(serve.deployment(Greeter), serve.Deployment[Greeter])
    squares = assert_type(serve.deployment(num_replicas=2)(Square), serve.Deployment[Square])
    assert_type(squares.options(name="Squares"), serve.Deployment[Square])
    assert_type(squares.bind(), serve.Application[Square])
    known: DeploymentHandle[Square] = serve.get_deployment_handle("Square", "app")
    assert_type(known.options(timeout_s=1.0), DeploymentHandle[Square])


def serving() -> None:
    """Not run here: it would start processes."""
    assert_type(serve.run(serve.deployment(Greeter).bind()), SyncHandle[Greeter])
    assert_type(serve.run(serve.deployment(greet).bind()).call("Ada"), str)
    assert_type(serve.run(serve.deployment(max_ongoing_requests=2)(double).bind()).call(3), int)
    assert_type(list(serve.run(serve.deployment(Letters).bind()).stream("abc")), list[str])
