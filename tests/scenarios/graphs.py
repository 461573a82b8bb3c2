"""Applications of several deployments, as people compose them."""

import time
import warnings
from dataclasses import dataclass
from typing import Any

from millstream import serve
from millstream.handles.handle import DeploymentHandle


@serve.deployment
async def upper(text: str) -> str:
    return text.upper()


@serve.deployment
def exclaim(text: str) -> str:
    return f"{text}!"


@serve.deployment
class Suffix:
    """Counts its calls: whoever shares it sees the others' calls, too."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._calls = 0

    async def __call__(self, text: str) -> str:
        self._calls += 1
        return text + self._suffix

    async def calls(self) -> int:
        return self._calls


@dataclass(frozen=True)
class Stages:
    first: Any
    rest: tuple[Any, ...] = ()


@serve.deployment
class Chain:
    """Finds its handles wherever they were bound, and passes un-awaited results from one to the next."""

    def __init__(self, *places: Any, **named: Any) -> None:
        self._handles = list(handles_in([*places, named]))

    async def __call__(self, text: str) -> str:
        value: Any = text
        for handle in self._handles:
            value = handle.remote(value)
        result: str = await (await value)
        return result

    async def names(self) -> list[str]:
        return [handle.deployment_name for handle in self._handles]


def handles_in(place: Any) -> Any:
    if isinstance(place, DeploymentHandle):
        yield place
    elif isinstance(place, dict):
        for value in place.values():
            yield from handles_in(value)
    elif isinstance(place, list | tuple | set | frozenset):
        for value in place:
            yield from handles_in(value)
    elif isinstance(place, Stages):
        yield from handles_in((place.first, place.rest))


@serve.deployment
class Dispatcher:
    """Chooses among its handles for each request."""

    def __init__(self, by_language: dict[str, DeploymentHandle]) -> None:
        self._by_language = by_language

    async def __call__(self, language: str, text: str) -> str:
        answer: str = await self._by_language[language].call(text)
        return answer

    async def by_ref(self, language: str, text: str) -> str:
        ref = await self._by_language[language].remote(text)
        answer: str = await ref
        return answer


@serve.deployment
class Visitor:
    """Finds another application by name, in each of the ways there are."""

    def __init__(self, app: str, deployment: str) -> None:
        self._app, self._deployment = app, deployment

    async def by_app(self, text: str) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            handle = serve.get_app_handle(self._app)
        answer: str = await handle.call(text)
        return answer

    async def by_name(self, text: str) -> str:
        answer: str = await serve.get_deployment_handle(self._deployment, self._app).call(text)
        return answer

    def in_a_thread(self, text: str) -> str:
        answer: str = serve.get_deployment_handle(self._deployment, self._app, sync=True).call(text)
        return answer

    async def how_long_a_lookup_takes(self) -> float:
        started = time.perf_counter()
        for _ in range(10):
            serve.get_app_handle(self._app)
        return (time.perf_counter() - started) / 10


@serve.deployment
class Ping:
    """Calls the other application as long as there is something left, which calls back."""

    def __init__(self, other: str) -> None:
        self._other = other

    async def __call__(self, left: int) -> list[str]:
        if left == 0:
            return []
        return [self._other, *await serve.get_app_handle(self._other).call(left - 1)]
