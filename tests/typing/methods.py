"""What only mypy with our plugin says: methods by their names, and classes under `@serve.deployment` as types."""

from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Protocol, TypeVar, assert_type

from millstream import DeploymentHandle, ObjectRef, SyncHandle, serve
from millstream.handles.arguments import RefTask
from millstream.handles.streaming import AsyncStream, Stream

T = TypeVar("T")


@serve.deployment(max_ongoing_requests=5)
class Model:
    async def predict(self, text: str, *, threshold: float = 0.5) -> float:
        return len(text) * threshold

    def label(self, score: float) -> str | None:
        return "long" if score > 1 else None

    async def words(self, text: str, *more: str) -> AsyncIterator[str]:
        for word in (*text.split(), *more):
            yield word

    def letters(self, text: str) -> AsyncIterator[str]:
        async def items() -> AsyncIterator[str]:
            for letter in text:
                yield letter

        return items()

    @serve.batch(max_batch_size=2, batch_wait_timeout_s=0.001)
    async def lengths(self, texts: list[str], offsets: list[int]) -> list[int]:
        return [len(text) + offset for text, offset in zip(texts, offsets, strict=True)]

    @serve.batch(batch_wait_timeout_s=0.001)
    async def upto(self, counts: list[int]) -> AsyncIterator[list[int]]:
        yield [-count for count in counts]
        yield counts

    async def swap(self, pair: tuple[int, T]) -> tuple[T, int]:
        return pair[1], pair[0]

    @property
    def double(self) -> Callable[[int], int]:
        return lambda x: 2 * x

    @classmethod
    def default(cls) -> float:
        return 0.5

    @staticmethod
    def version() -> bytes:
        return b"1"


@serve.deployment
class Front:
    def __init__(self, model: DeploymentHandle[Model], limit: int = 3) -> None:
        self._model, self._limit = model, limit

    async def __call__(self, text: str) -> str | None:
        score = self._model.predict.remote(text)  # not awaited, but passed on
        return await self._model.label.call(score)

    async def score(self, text: str) -> float:
        return await self._model.predict.call(text)


class Base(Generic[T]):
    async def same(self, x: T) -> T:
        return x


@serve.deployment
class Derived(Base[int]):
    async def twice(self, x: int) -> int:
        return 2 * await self.same(x)


class Run(Protocol):
    """`serve.run`, but for asynchronous code."""

    def __call__(self, application: serve.Application[T], /) -> DeploymentHandle[T]: ...


async def calls(run: Run) -> None:
    model = assert_type(run(Model.bind()), DeploymentHandle[Model])
    assert_type(await model.predict.call("abc"), float)
    assert_type(await model.predict.call(text="abc", threshold=1.0), float)
    assert_type(model.predict.remote("abc"), RefTask[float])
    assert_type(await (await model.predict.remote("abc")), float)
    assert_type(await model.label.call(model.predict.remote("abc")), str | None)
    assert_type(await model.label.options(priority="high").call(0.5), str | None)
    assert_type([x async for x in model.predict.map(["a", "b"])], list[float])
    assert_type(await model.swap.call((3, "x")), Any)
    assert_type(await model.default.call(), float)
    assert_type(await model.version.call(), bytes)


async def streams(run: Run) -> None:
    model = run(Model.bind())
    assert_type(model.words.stream("a b", "c", "d"), AsyncStream[str])
    assert_type([x async for x in model.words.stream("a b")], list[str])
    assert_type([x async for x in model.options(stream=True).words.remote("a b")], list[str])
    assert_type([x async for x in model.words.options(stream=True, max_ahead=3).remote("a b")], list[str])


async def batches(run: Run) -> None:
    model = run(Model.bind())
    assert_type(await model.lengths.call("abc", 1), int)
    assert_type(await model.lengths.call(texts="abc", offsets=model.lengths.remote("a", 2)), int)
    assert_type([x async for x in model.upto.stream(3)], list[int])


async def graphs(run: Run) -> None:
    front = run(Front.bind(Model.bind(), limit=2))
    assert_type(await front.call("abc"), str | None)
    assert_type(await front.score.call("abc"), float)
    derived = run(Derived.bind())
    assert_type(await derived.twice.call(derived.same.remote(1)), int)


def blocking(model: SyncHandle[Model]) -> None:
    assert_type(model.predict.call("abc"), float)
    ref = assert_type(model.predict.remote("abc"), ObjectRef[float])
    assert_type(model.label.call(ref), str | None)
    assert_type(model.words.stream("a b"), Stream[str])
    assert_type(list(model.options(stream=True).words.remote("a b")), list[str])
    assert_type(list(model.predict.map(["a", "b"])), list[float])


def deployments() -> None:
    deployment: serve.Deployment[Model] = Model
    assert_type(deployment.bind(), serve.Application[Model])
    assert_type(Model.bind(), serve.Application[Model])
    assert_type(Model.options(num_replicas=2), serve.Deployment[Model])
    assert_type(Model.name, str)
