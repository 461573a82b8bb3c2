"""`@serve.deployment`, `.bind()` and the graph they make: values that say what to run, with no side effects."""

import copy
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, Protocol, TypeVar, overload

from millstream.broker.definitions import max_ongoing
from millstream.broker.keys import check_name
from millstream.config import DeploymentConfig
from millstream.errors import ConfigError
from millstream.handles.generics import T, T_co
from millstream.handles.handle import DeploymentHandle, SyncHandle

F = TypeVar("F", bound=Callable[..., Any])


class Deployment(Generic[T_co]):
    """A class or function that can be served, with its config. Made by `@serve.deployment`."""

    def __init__(self, func_or_class: Callable[..., Any], name: str, config: DeploymentConfig) -> None:
        self.func_or_class, self.name, self.config = func_or_class, name, config
        self.__doc__, self.__module__ = func_or_class.__doc__, func_or_class.__module__

    def bind(self, *args: Any, **kwargs: Any) -> "Application[T_co]":
        """A node of a graph: this deployment with constructor arguments.

        Nodes among the arguments become handles. The same node bound twice is one deployment; the same class bound
        twice is two, `D` and `D_1`. Raises TypeError when the constructor would not take the arguments.
        """
        self._check_arguments(args, kwargs)
        return Application(self, args, kwargs)

    def options(self, **options: Any) -> "Deployment[T_co]":
        """A copy with other options; the same names as `@serve.deployment`. Raises ConfigError."""
        name = options.pop("name", None) or self.name
        return Deployment(self.func_or_class, _checked_name(name), self.config.updated(options))

    def deploy(self, *args: Any, _blocking: bool = True, **kwargs: Any) -> None:
        """Ray's first API: `serve.run(self.bind(...), name=self.name)`."""
        serve = importlib.import_module("millstream.serve")  # above us
        serve.run(self.bind(*args, **kwargs), name=self.name, _blocking=_blocking)

    def delete(self) -> None:
        """Delete what `deploy` has deployed. No error if there is nothing."""
        importlib.import_module("millstream.serve").delete(self.name)

    @overload
    def get_handle(self, sync: Literal[True] = True) -> SyncHandle[T_co]: ...
    @overload
    def get_handle(self, sync: Literal[False]) -> DeploymentHandle[T_co]: ...
    def get_handle(self, sync: bool = True) -> Any:
        """A handle of what `deploy` has deployed: one that blocks, or with sync=False one for an event loop."""
        return (SyncHandle if sync else DeploymentHandle)(self.name, self.name)

    if not TYPE_CHECKING:  # for type checkers it is an error that there is no such method

        def __call__(self, *_: Any, **__: Any) -> NoReturn:
            raise RuntimeError(
                f"deployment {self.name!r} is not called itself: deploy it with serve.run({self.name}.bind(...)) "
                "and call the handle that returns"
            )

    def __repr__(self) -> str:
        return f"Deployment(name={self.name!r})"

    def _check_arguments(self, args: Any, kwargs: Any) -> None:
        if not inspect.isclass(self.func_or_class):
            if args or kwargs:
                raise TypeError(f"deployment {self.name!r} is a function: bind() takes no arguments for it")
            return
        try:
            signature = inspect.signature(self.func_or_class)
        except (ValueError, TypeError):
            return  # a builtin or a metaclass: its constructor will tell
        try:
            signature.bind(*args, **kwargs)
        except TypeError as e:
            raise TypeError(f"{self.name}.bind(): {e}") from None


@dataclass(frozen=True, eq=False)
class Application(Generic[T_co]):
    """A bound deployment and, through its arguments, the graph below it. Equal only to itself."""

    deployment: Deployment[T_co]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __repr__(self) -> str:
        return f"Application({self.deployment.name!r})"

    def __getattr__(self, name: str) -> NoReturn:
        if name in ("remote", "call", "options", "map"):
            raise AttributeError(
                f"{self!r} is a node of a graph and no handle: it becomes one where it is an argument of bind(), itself or "
                "inside lists, tuples, sets, dicts and dataclasses; inside other objects it is not found"
            )
        raise AttributeError(f"Application has no attribute {name!r}")


@dataclass(frozen=True, slots=True)
class Node:
    """One deployment of a compiled graph: handles stand where other nodes stood."""

    name: str
    deployment: Deployment
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def config(self) -> DeploymentConfig:
        """With `max_ongoing_requests` settled: the autoscaler, which imports no user code, goes by it."""
        config = self.deployment.config
        return replace(config, max_ongoing_requests=max_ongoing(self.deployment.func_or_class, config))


def compile_graph(application: Application, app_name: str) -> list[Node]:
    """The deployments of an application, the ingress first, each named once."""
    if not isinstance(application, Application):
        hint = "; write .bind() after it" if isinstance(application, Deployment) else ""
        raise TypeError(f"serve.run() takes what .bind() returns, not {type(application).__name__}{hint}")
    names: dict[Application, str] = {}
    for node in _walk(application):
        names[node] = _unused(node.deployment.name, set(names.values()))

    def with_handles(value: Any) -> Any:
        return _replaced(value, lambda node: DeploymentHandle(names[node], app_name))

    return [
        Node(name, node.deployment, with_handles(node.args), with_handles(node.kwargs)) for node, name in names.items()
    ]


def _walk(application: Application) -> Iterator[Application]:
    """Every node once, callers before what they call."""
    seen: set[Application] = set()
    todo = [application]
    while todo:
        node = todo.pop(0)
        if node not in seen:
            seen.add(node)
            yield node
            _replaced((node.args, node.kwargs), lambda inner: todo.append(inner) or inner)  # type: ignore[func-returns-value]


def _unused(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    return next(candidate for n in range(1, len(taken) + 1) if (candidate := f"{name}_{n}") not in taken)


def _replaced(value: Any, make: Callable[[Application], Any]) -> Any:
    """`value` with every node in it, in containers and dataclasses at any depth, replaced; itself if there is none."""
    if isinstance(value, Application):
        return make(value)
    if isinstance(value, dict):
        new = {key: _replaced(item, make) for key, item in value.items()}
        if all(new[key] is value[key] for key in value):
            return value
        changed = copy.copy(value)  # a defaultdict stays one
        changed.update(new)
        return changed
    if isinstance(value, list | tuple | set | frozenset):
        items = [_replaced(item, make) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        changes = {f.name: _replaced(getattr(value, f.name), make) for f in fields(value) if f.init}
        if any(changes[name] is not getattr(value, name) for name in changes):
            return replace(value, **changes)
    return value


def _checked_name(name: Any) -> str:
    try:
        return check_name("deployment", name)
    except ValueError as e:
        raise ConfigError(str(e)) from None


class _Decorator(Protocol):
    @overload
    def __call__(self, target: type[T], /) -> Deployment[T]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, target: F, /) -> Deployment[F]: ...


@overload
def deployment(func_or_class: type[T], /) -> Deployment[T]: ...  # type: ignore[overload-overlap]
@overload
def deployment(func_or_class: F, /) -> Deployment[F]: ...
@overload
def deployment(**options: Any) -> _Decorator: ...
def deployment(func_or_class: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a class or function servable. Bare, or with options.

    Options: name, num_replicas (a number or "auto"), autoscaling_config, max_ongoing_requests (alias
    max_concurrent_queries), sync_threads, max_attempts, retry, result_ttl_s, user_config, health_check_period_s,
    health_check_timeout_s, graceful_shutdown_timeout_s, start_method, resources (alias ray_actor_options; num_cpus and
    num_gpus, kept on record: placement does not go by them yet), version. Raises ConfigError, which names the option.

    What a class may have besides its methods, each of them sync or async: `reconfigure(user_config)`, called after the
    constructor and whenever a redeploy changes user_config; `check_health()`, which raises if the replica should be
    replaced; `__del__()`, called when a replica leaves in order.
    """

    def decorate(target: Callable[..., Any]) -> Deployment:
        if isinstance(target, Deployment):
            raise TypeError(f"{target!r} is a deployment already")
        if not callable(target):
            raise TypeError(f"@serve.deployment takes a class or a function, not {type(target).__name__}")
        given = dict(options)
        name = given.pop("name", None) or target.__name__
        return Deployment(target, _checked_name(name), DeploymentConfig().updated(given))

    return decorate if func_or_class is None else decorate(func_or_class)


if TYPE_CHECKING:
    from abc import ABCMeta

    class DecoratedClass(Deployment[T_co], ABCMeta):
        """The metaclass that the mypy plugin gives to a class under the decorator: so it has `bind` and the rest."""
