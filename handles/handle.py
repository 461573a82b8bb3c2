"""`DeploymentHandle` (asynchronous) and `SyncHandle`: how requests are made. Both pickle as names and options."""

import asyncio
import functools
import math
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NoReturn, Self

from millstream.broker.codec import Codec
from millstream.broker.keys import deployment_tag
from millstream.broker.outcomes import open_stored
from millstream.errors import ConfigError
from millstream.handles import arguments, engines, mapping
from millstream.handles.arguments import RefTask
from millstream.handles.cell import Cell
from millstream.handles.engine import Engine
from millstream.handles.ref import ObjectRef
from millstream.handles.route import Pending, Route


@dataclass(frozen=True, slots=True)
class HandleOptions:
    """What `options()` can set."""

    method_name: str = "__call__"
    block_until: Literal["matched", "queued"] = "matched"
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.method_name, str) or not 0 < len(self.method_name.encode()) < 256:
            raise ConfigError(f"method_name={self.method_name!r} must be a method's name, of at most 255 bytes")
        if self.block_until not in ("matched", "queued"):
            raise ConfigError(f"block_until={self.block_until!r} is unknown; use 'matched' or 'queued'")
        if not isinstance(self.delay_s, int | float) or not 0 <= self.delay_s < math.inf:
            raise ConfigError(f"delay_s={self.delay_s!r} must be a number of seconds, 0 or more")


_OPTION_NAMES = tuple(field.name for field in fields(HandleOptions))


class _Handle:
    """What both handles are: a deployment's name, and options."""

    def __init__(self, deployment_name: str, app_name: str = "default", options: HandleOptions | None = None) -> None:
        self._app, self._deployment = app_name, deployment_name
        self._options = options or HandleOptions()
        self._tag = deployment_tag(app_name, deployment_name)
        self._method = self._options.method_name.encode()
        self._want = self._options.block_until.encode()
        self._what = f"the arguments of {self._tag}.{self._options.method_name}, (args, kwargs)"
        self._engine: Engine | None = None
        self._route: Route | None = None

    @property
    def deployment_name(self) -> str:
        return self._deployment

    @property
    def app_name(self) -> str:
        return self._app

    def options(self, **options: Any) -> Self:
        """A copy with other options: method_name, block_until ("matched" | "queued"), delay_s. TypeError for others."""
        unknown = [name for name in options if name not in _OPTION_NAMES]
        if unknown:
            raise TypeError(f"options() got an unknown option {unknown[0]!r}; known are {', '.join(_OPTION_NAMES)}")
        return type(self)(self._deployment, self._app, replace(self._options, **options))

    def __getattr__(self, name: str) -> Self:
        # pickle, copy and inspect ask for dunders: they must not become methods of the deployment.
        if name.startswith("_"):
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}; for such a method use options(method_name=)"
            )
        method: Self = self.options(method_name=name)
        self.__dict__[name] = method  # the next call finds it without coming here
        return method

    def __repr__(self) -> str:
        method = "" if self._options.method_name == "__call__" else f", method_name={self._options.method_name!r}"
        return f"{type(self).__name__}({self._deployment!r}, app_name={self._app!r}{method})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._deployment, self._app, self._options)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Handle):
            return NotImplemented
        return type(self) is type(other) and (self._tag, self._options) == (other._tag, other._options)

    def __hash__(self) -> int:
        return hash((self._tag, self._options))

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"a handle is not called itself: write {self._deployment}.remote(...) or .call(...)")

    def _submit(
        self, engine: Engine, route: Route, pending: Pending, encoded: arguments.Arguments, want: bytes
    ) -> None:
        """Hand one request to the engine; on its loop."""
        envelope = route.codec.seal("request", pending.ref, encoded.body, self._method)
        if encoded.depends_on or self._options.delay_s:
            needed = [ref.id for ref in encoded.depends_on]
            engine.hold(route, pending, self._method, envelope, needed, self._options.delay_s)
            for ref in encoded.depends_on:
                ref._if_never_sent(functools.partial(engine.give_up, route, pending.ref))
        elif encoded.mentions:
            mentioned = [ref.id for ref in encoded.mentions]
            engine.submit_after(mentioned, route, pending, self._method, want, envelope)
        else:
            engine.submit(route, pending, self._method, want, envelope)


class CallFuture(asyncio.Future[Any]):
    """What `DeploymentHandle.call` returns: a future of the value. Cancelling it does not cancel the request."""

    codec: Codec
    ref: bytes
    since: float

    def settle(self, stored: bytes) -> None:
        if not self.done():
            try:
                self.set_result(open_stored(self.codec, self.ref, stored))
            except BaseException as e:
                self.set_exception(_settable(e))

    def fail(self, error: BaseException) -> None:
        if not self.done():
            self.set_exception(error)

    def match(self) -> None:
        pass


def _settable(error: BaseException) -> BaseException:
    # asyncio refuses to set a StopIteration: in a coroutine it would mean "return".
    return RuntimeError(f"the request raised {type(error).__name__}") if isinstance(error, StopIteration) else error


class DeploymentHandle(_Handle):
    """The asynchronous handle: for code on an event loop, and inside other deployments.

    A request is sent at the call, not at the first await.
    """

    def remote(self, *args: Any, **kwargs: Any) -> RefTask:
        """Send a request. The task gives its `ObjectRef` once a replica has it, or it is parked, delayed or ended.

        With block_until="queued", once the server has it. From then on it is not lost, whatever becomes of the caller.

        Raises SerializationError at once; the task raises DeploymentNotFoundError, DeployFailedError,
        BrokerUnavailableError, BackPressureError. The un-awaited task can be an argument of another call.
        """
        engine, route = self._route_here()
        cell = Cell(route.codec, engine.new_ref())
        self._submit(engine, route, cell, arguments.encode(self._what, args, kwargs), self._want)
        ref = ObjectRef(cell.ref_id, cell, engine)
        task = RefTask(self._matched(cell, ref, engine), loop=engine.loop)
        task.ref = ref
        return task

    def call(self, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """Send a request and await its value: one await. Raises what `remote` and its ref do."""
        engine, route = self._route_here()
        future = CallFuture(loop=engine.loop)
        future.codec, future.ref, future.since = route.codec, engine.new_ref(), engine.now()
        self._submit(engine, route, future, arguments.encode(self._what, args, kwargs), b"")
        return future

    def map(
        self,
        iterable: Iterable[Any] | AsyncIterable[Any],
        *,
        max_in_flight: int = 1000,
        ordered: bool = True,
        progress: bool = False,
    ) -> AsyncIterator[Any]:
        """An async iterator of the values of one call per item, at most `max_in_flight` of them under way.

        In the order of the items, or as they complete. The first error is raised in its place and ends the iteration.
        """
        return mapping.map_async(self.call, iterable, max_in_flight, ordered=ordered, progress=progress)

    async def _matched(self, cell: Cell, ref: ObjectRef, engine: Engine) -> ObjectRef:
        if not cell.is_matched:
            await cell.future(engine.loop, for_end=False)
        _raise_if_unsent(cell)
        return ref

    def _route_here(self) -> tuple[Engine, Route]:
        engine = self._engine
        if engine is None or engine.is_closed or engine.loop is not asyncio._get_running_loop():
            if engines.running_loop() is None:
                raise RuntimeError(
                    f"no event loop runs in this thread, and {self!r} needs one; "
                    f"call it in a coroutine, or use SyncHandle({self._deployment!r}, {self._app!r})"
                )
            engine = self._engine = engines.current()
            self._route = engine.route(self._tag)
        assert self._route is not None
        return engine, self._route


class SyncHandle(_Handle):
    """The blocking handle: for scripts, threads and notebooks. `serve.run` returns one."""

    def remote(self, *args: Any, **kwargs: Any) -> ObjectRef:
        """Send a request and block until a replica has it (or it is parked, delayed or ended). Answers Ctrl-C.

        Raises SerializationError, DeploymentNotFoundError, DeployFailedError, BrokerUnavailableError, BackPressureError.
        """
        engines.warn_if_on_a_loop(f"{type(self).__name__}.remote()", "`await` with a DeploymentHandle")
        cell, engine = self._send(args, kwargs, self._want)
        cell.wait(None, for_end=False)
        _raise_if_unsent(cell)
        return ObjectRef(cell.ref_id, cell, engine)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Send a request and block for its value."""
        engines.warn_if_on_a_loop(f"{type(self).__name__}.call()", "`await` with a DeploymentHandle's call()")
        cell, _ = self._send(args, kwargs, b"")
        cell.wait(None)
        return cell.read()

    def map(
        self, iterable: Iterable[Any], *, max_in_flight: int = 1000, ordered: bool = True, progress: bool = False
    ) -> Iterator[Any]:
        """An iterator of the values of one call per item, at most `max_in_flight` of them under way.

        In the order of the items, or as they complete. The first error is raised in its place and ends the iteration.
        """

        def send(item: Any) -> Cell:
            return self._send((item,), {}, b"")[0]

        return mapping.map_sync(send, iterable, max_in_flight, ordered=ordered, progress=progress)

    def _send(self, args: tuple[Any, ...], kwargs: dict[str, Any], want: bytes) -> tuple[Cell, Engine]:
        background = engines.background()
        engine = background.engine
        route = engine.route(self._tag)
        encoded = arguments.encode(self._what, args, kwargs)
        cell = Cell(route.codec, engine.new_ref())
        background.call(self._submit, engine, route, cell, encoded, want)
        return cell, engine


def _raise_if_unsent(cell: Cell) -> None:
    """After the match: a request that never reached the server raises here, one that ran and failed at its ref."""
    if cell.has_ended and cell.stored is None:
        cell.read()
