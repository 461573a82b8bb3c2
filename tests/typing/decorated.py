"""Classes and functions under `@serve.deployment`, as pyright sees them by itself and mypy with our plugin.

To pyright their names are deployments and no types, so handles among the constructor's arguments stay `DeploymentHandle`.
"""

from collections.abc import AsyncIterator
from typing import Any, Protocol, TypeVar, assert_type

from millstream import DeploymentHandle, serve

T = TypeVar("T")


@serve.deployment
class Scale:
    def __init__(self, factor: float) -> None:
        self._factor = factor

    async def __call__(self, x: int) -> float:
        return self._factor * x

    def title(self) -> str:
        return "scale"


@serve.deployment(max_ongoing_requests=5, sync_threads=5)
class Words:
    def __call__(self, text: str) -> list[str]:
        return text.split()


@serve.deployment()
class Countdown:
    async def __call__(self, start: int) -> AsyncIterator[int]:
        for x in range(start, 0, -1):
            yield x


@serve.deployment
class Front:
    def __init__(self, scale: DeploymentHandle, others: list[DeploymentHandle], words: DeploymentHandle | None) -> None:
        self._scale, self._others, self._words = scale, others, words

    async def __call__(self, x: int) -> bytes:
        scaled = self._scale.remote(x)
        value: float = await self._others[0].call(await scaled)
        assert self._words is not None
        words: list[str] = await self._words.call(f"{value} {await self._scale.title.call()}")
        return " ".join(words).encode()


@serve.deployment
async def greet(name: str, mark: str = ".") -> str:
    return f"hello {name}{mark}"


@serve.deployment(num_replicas=1)
def double(x: int) -> int:
    return 2 * x


app = Front.bind(Scale.bind(2.0), [Scale.options(name="Again").bind(factor=0.5)], words=Words.bind())


class Run(Protocol):
    """`serve.run`, but for asynchronous code."""

    def __call__(self, application: serve.Application[T], /) -> DeploymentHandle[T]: ...


async def calls(run: Run) -> None:
    assert_type(await run(app).call(3), bytes)
    assert_type(await run(Words.bind()).call("a b"), list[str])
    assert_type(await run(Scale.options(name="Other").bind(2.0)).call(3), float)
    assert_type([x async for x in run(Countdown.bind()).stream(3)], list[int])


async def functions(run: Run) -> None:
    assert_type(await run(greet.bind()).call("Ada", mark="!"), str)
    assert_type([x async for x in run(double.bind()).map([1, 2])], list[int])


def deployments() -> None:
    assert_type(Scale.name, str)
    assert_type(Words.config.sync_threads, int)
    assert_type(app.kwargs, dict[str, Any])


def serving() -> None:
    """Not run here: it would start processes."""
    assert_type(serve.run(app).call(3), bytes)
    assert_type(serve.run(Words.bind(), name="words").remote("a b").result(), list[str])
    assert_type(serve.run(greet.bind(), name="greet").call("Ada"), str)
