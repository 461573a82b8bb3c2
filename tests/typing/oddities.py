"""Code that the plugin must not stumble over, nor complain about. Read by mypy, never run."""

import abc
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, Protocol, TypedDict, TypeVar, Unpack, assert_type, overload

from millstream import DeploymentHandle, ObjectRef, SyncHandle, serve

T = TypeVar("T")
P = ParamSpec("P")


class Options(TypedDict, total=False):
    size: int


class Meta(type):
    pass


@serve.deployment
class WithMetaclass(metaclass=Meta):
    def __call__(self) -> int:
        return 1


@serve.deployment
class Abstract(abc.ABC):
    @abc.abstractmethod
    def __call__(self) -> int: ...


@serve.deployment
@dataclass
class Data:
    factor: int
    others: dict[str, list[DeploymentHandle]]

    def __call__(self, x: int) -> int:
        return self.factor * x


@serve.deployment
class Container(Generic[T]):
    def __init__(self, item: T) -> None:
        self.item = item

    def __call__(self, x: T) -> list[T]:
        return [x, self.item]

    @serve.batch
    async def many(self, xs: list[T]) -> list[T]:
        return xs


@serve.deployment
class Calls:
    value = 3
    callback: Callable[[int], str]

    def __init__(
        self, *handles: DeploymentHandle, names: list[str] | None = None, **more: DeploymentHandle
    ) -> None: ...

    def __call__(self, x: T) -> list[T]:
        return [x]

    @overload
    def either(self, x: int) -> str: ...
    @overload
    def either(self, x: str) -> int: ...
    def either(self, x: int | str) -> int | str:
        return x

    def unpacked(self, x: int, **options: Unpack[Options]) -> int:
        return x

    def forwarded(self, function: Callable[P, int], *args: P.args, **kwargs: P.kwargs) -> int:
        return function(*args, **kwargs)

    def untyped(self, x, y=None):  # type: ignore[no-untyped-def]
        return x

    def anything(self, *args: Any, **kwargs: Any) -> Any:
        return args

    async def optional(self, x: int | None = None, *more: str, **named: float) -> None: ...


class Colour(enum.Enum):
    RED = 1


class MyHandle(DeploymentHandle[Data]):
    pass


class HandleLike(Protocol):
    def call(self, x: int) -> Any: ...


@serve.deployment
class TakesProtocol:
    def __init__(self, model: HandleLike, optional: DeploymentHandle[Data] | None) -> None: ...


H = TypeVar("H", bound=DeploymentHandle[Data])


@serve.deployment
def identity(x: T) -> T:
    return x


@serve.deployment
@serve.batch
async def batched(xs: list[int]) -> list[str]:
    return [str(x) for x in xs]


async def calls(
    calls: DeploymentHandle[Calls],
    mine: MyHandle,
    either: DeploymentHandle[Data] | DeploymentHandle[Calls],
    container: DeploymentHandle[Container[int]],
    unknown: Any,
) -> None:
    assert_type(await calls.call(3), Any)
    assert_type([x async for x in calls.map([1, 2])], list[Any])
    assert_type(await calls.either.call("3"), Any)
    await calls.unpacked.call(3, size=2)
    await calls.forwarded.call(len, "abc")
    await calls.untyped.call(1, y=2)
    await calls.anything.call(1, y=2)
    await calls.anything.call(*unknown, **unknown)
    await calls.callback.call(3)
    await calls.optional.call(3, "a", "b", y=calls.anything.remote(1), z=1.5)
    await calls.optional.call(await calls.optional.remote(), c=ObjectRef.from_id("x"))
    await mine.call(3)
    await mine.half.call()
    either.options(priority="high")
    assert_type(await container.call(3), list[int])
    assert_type(await container.many.call(3), int)
    await unknown.call(3).whatever.remote(DeploymentHandle("x").call(3))
    async with unknown as other:
        other.call(calls.anything.remote(lambda x: x))


async def generic(handle: H, other: DeploymentHandle[T]) -> T:
    await handle.call(3)
    handle.app_name.upper()
    return await other.options(priority="high").call()  # type: ignore[misc]


def nodes() -> None:
    serve.run(WithMetaclass.bind())
    assert_type(serve.run(Container.bind(3)).call(3), list[Any])
    serve.run(Data.options(name="x").bind(3, {"a": [WithMetaclass.bind(), Data.bind(2, others={})]}))
    serve.run(Calls.bind(Data.bind(3, {}), WithMetaclass.bind(), names=["a"], other=Data.bind(3, {})))
    serve.run(TakesProtocol.bind(Data.bind(3, {}), None))
    serve.run(TakesProtocol.bind(Data.bind(3, {}), optional=Data.bind(3, {})))
    assert_type(serve.run(identity.bind()).call(3), Any)
    assert_type(serve.run(batched.bind()).call(3), str)

    @serve.deployment(num_replicas=1)
    class Local:
        async def __call__(self) -> Colour:
            return Colour.RED

    assert_type(serve.run(Local.bind()).call(), Colour)
    handles: list[SyncHandle] = [serve.run(Local.bind()), serve.run(WithMetaclass.bind())]
    for handle in handles:
        handle.anything.call(handle.what.remote())
