"""`DeploymentHandle` (asynchronous) and `SyncHandle`: how requests are made. Both pickle as names and options."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, Unpack, overload

from millstream.handles import context, engines, map_refs, mapping
from millstream.handles.arguments import RefTask
from millstream.handles.base_handle import BaseHandle
from millstream.handles.call_future import CallFuture, SharedCallFuture
from millstream.handles.cell import Cell
from millstream.handles.engine import Engine
from millstream.handles.generics import A, Async, Async1, Plain, Plain1, R, T_co, Yields
from millstream.handles.map_types import AsyncMixed, Choices, Collecting, Many, Mixed, Several
from millstream.handles.ref import ObjectRef
from millstream.handles.route import Pending, Route
from millstream.handles.sending import Row
from millstream.handles.stream_cell import StreamCell
from millstream.handles.streaming import AsyncStream, Stream


class DeploymentHandle(BaseHandle, Generic[T_co]):
    """The asynchronous handle, for event loops and inside other deployments. It sends at the call, not at the await."""

    if TYPE_CHECKING:

        @overload
        def options(self, *, method_name: str, stream: Literal[True], **options: Any) -> "_Streaming[Any]": ...
        @overload
        def options(self, *, method_name: str, **options: Any) -> "DeploymentHandle[Any]": ...
        @overload
        def options(self, *, stream: Literal[True], **options: Any) -> "_Streaming[T_co]": ...
        @overload
        def options(self, **options: Any) -> Self: ...
        def options(self, **options: Any) -> Any: ...
        def __getattr__(self, name: str) -> "DeploymentHandle[Any]": ...

    @overload
    def remote(self: "DeploymentHandle[Async[R]]", *args: Any, **kwargs: Any) -> RefTask[R]: ...
    @overload
    def remote(self: "DeploymentHandle[Yields[R]]", *args: Any, **kwargs: Any) -> AsyncStream[R]: ...
    @overload
    def remote(self: "DeploymentHandle[Plain[R]]", *args: Any, **kwargs: Any) -> RefTask[R]: ...
    def remote(self: "DeploymentHandle[Any]", *args: Any, **kwargs: Any) -> Any:
        """Send a request. The task gives its `ObjectRef` once a replica has it, or it is parked, delayed or ended.

        With block_until="queued", once the server has it. From then on it is not lost, whatever becomes of the caller.
        Cancelling the task before that cancels the request (as in Ray), later, or once it is an argument of another call,
        it does nothing. With options(stream=True)
        this is `stream`.

        Raises SerializationError at once; the task raises DeploymentNotFoundError, DeployFailedError,
        BrokerUnavailableError, BackPressureError, RequestTimeoutError (no replica took it in time). The un-awaited task
        can be an argument of another call.
        """
        options = self._options
        if options.stream:
            return self.stream(*args, **kwargs)
        engine, route = self._route_here()
        cell = Cell(route.codec, self._new_ref(engine, route))
        self._send(engine, route, cell, args, kwargs, for_match=True)
        ref = ObjectRef(cell.ref_id, cell, engine)
        if options.idempotency_key is not None:
            ref.share()
        task = RefTask(self._matched(cell, ref, engine), loop=engine.loop)
        task.ref = ref
        return task

    @overload
    def call(self: "DeploymentHandle[Async[R]]", *args: Any, **kwargs: Any) -> asyncio.Future[R]: ...
    @overload
    def call(self: "DeploymentHandle[Plain[R]]", *args: Any, **kwargs: Any) -> asyncio.Future[R]: ...
    def call(self, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """Send a request and await its value: one await. Raises what `remote` and its ref do."""
        engine, route = self._route_here()
        future = (CallFuture if self._options.idempotency_key is None else SharedCallFuture)(loop=engine.loop)
        future.codec, future.ref, future.since = route.codec, self._new_ref(engine, route), engine.now()
        self._send(engine, route, future, args, kwargs)
        return future

    def stream(self: "DeploymentHandle[Yields[R]]", *args: Any, **kwargs: Any) -> AsyncStream[R]:
        """Call a generator method: an async iterator of its items, as they are produced.

        At most `max_ahead` of them are produced before they are read. Closing the iterator early (`aclose`, or dropping
        it) cancels the request. An error of the generator is raised after the items before it. TypeError (as a TaskError)
        where the method is no generator.
        """
        engine, route = self._route_here()
        cell = StreamCell(route, engine.new_ref(), engine, self._options.max_ahead)
        self._submit(engine, route, cell, self._encode(args, kwargs).snapshot(), self._options.streaming)
        if (caller := context.current.get()) is not None:
            caller.sends(engine, cell)
        return AsyncStream(cell)

    @overload
    def map(self: "DeploymentHandle[Async1[A, R]]", iterable: Many[A], **how: Unpack[Choices]) -> AsyncIterator[R]: ...
    @overload
    def map(self: "DeploymentHandle[Plain1[A, R]]", iterable: Many[A], **how: Unpack[Choices]) -> AsyncIterator[R]: ...
    @overload
    def map(self: "DeploymentHandle[Async1[A, R]]", iterable: Many[A], **how: Unpack[Collecting]) -> AsyncMixed[R]: ...
    @overload
    def map(self: "DeploymentHandle[Plain1[A, R]]", iterable: Many[A], **how: Unpack[Collecting]) -> AsyncMixed[R]: ...
    def map(self: "DeploymentHandle[Any]", iterable: Many[Any], **how: Any) -> AsyncIterator[Any]:
        """As `mapping.async_map` says: an async iterator of the values of one call per item."""
        return mapping.async_map(self, iterable, **how)

    starmap = mapping.async_starmap

    @overload
    def map_refs(self: "DeploymentHandle[Async1[A, R]]", items: Many[A]) -> Coroutine[Any, Any, list[ObjectRef[R]]]: ...
    @overload
    def map_refs(self: "DeploymentHandle[Plain1[A, R]]", items: Many[A]) -> Coroutine[Any, Any, list[ObjectRef[R]]]: ...
    def map_refs(self: "DeploymentHandle[Any]", items: Many[Any]) -> Coroutine[Any, Any, list[ObjectRef[Any]]]:
        """As `map_refs.async_map_refs` says: the refs of one request per item, once the server has them all."""
        return map_refs.async_map_refs(self, items)

    def _send(
        self,
        engine: Engine,
        route: Route,
        pending: Pending,
        args: Any,
        kwargs: Any,
        *,
        for_match: bool = False,
        until_queued: bool = False,
    ) -> None:
        until_queued = until_queued or (for_match and self._options.block_until == "queued")
        extras = self._matched_extras if for_match and not until_queued else self._plain
        caller = context.current.get()
        encoded = self._encode_quickly(args, kwargs, caller)
        if isinstance(encoded, bytes):
            self._submit_plain(engine, route, pending, encoded, extras, until_queued)
        else:
            self._submit(engine, route, pending, encoded.snapshot(), extras, until_queued)
        if caller is not None and self._options.idempotency_key is None:
            caller.sends(engine, pending)  # it ends with its caller; one with a key may be somebody else's, too

    def _way(self) -> tuple[Engine, Route]:
        return self._route_here()

    def _send_plain_rows(
        self, engine: Engine, route: Route, pendings: list[Pending], requests: list[Any], until_queued: bool
    ) -> None:
        engine.sender.submit_all(route, pendings, requests, until_queued)

    def _send_row(self, pending: Pending, row: Row, until_queued: bool) -> None:
        self._send(*self._route_here(), pending, row, {}, until_queued=until_queued)

    async def _matched(self, cell: Cell, ref: ObjectRef, engine: Engine) -> ObjectRef:
        if not cell.is_matched:
            await cell.future(engine.loop, for_end=False)
        cell.raise_if_lost()
        return ref

    def _route_here(self) -> tuple[Engine, Route]:
        engine = self._engine
        if engine is None or engine.is_closed or engine.loop is not asyncio._get_running_loop():
            engines.loop_here(repr(self))
            engine = self._engine = engines.current()
            self._route = engine.route(self._tag)
        assert self._route is not None
        return engine, self._route


class SyncHandle(BaseHandle, Generic[T_co]):
    """The blocking handle: for scripts, threads and notebooks. `serve.run` returns one."""

    if TYPE_CHECKING:

        @overload
        def options(self, *, method_name: str, stream: Literal[True], **options: Any) -> "_SyncStreaming[Any]": ...
        @overload
        def options(self, *, method_name: str, **options: Any) -> "SyncHandle[Any]": ...
        @overload
        def options(self, *, stream: Literal[True], **options: Any) -> "_SyncStreaming[T_co]": ...
        @overload
        def options(self, **options: Any) -> Self: ...
        def options(self, **options: Any) -> Any: ...
        def __getattr__(self, name: str) -> "SyncHandle[Any]": ...

    @overload
    def remote(self: "SyncHandle[Async[R]]", *args: Any, **kwargs: Any) -> ObjectRef[R]: ...
    @overload
    def remote(self: "SyncHandle[Yields[R]]", *args: Any, **kwargs: Any) -> Stream[R]: ...
    @overload
    def remote(self: "SyncHandle[Plain[R]]", *args: Any, **kwargs: Any) -> ObjectRef[R]: ...
    def remote(self: "SyncHandle[Any]", *args: Any, **kwargs: Any) -> Any:
        """Send a request and block until a replica has it (or it is parked, delayed or ended). Answers Ctrl-C.

        Returns its `ObjectRef`; with options(stream=True) this is `stream`. Raises SerializationError,
        DeploymentNotFoundError, DeployFailedError, BrokerUnavailableError, BackPressureError, RequestTimeoutError (no
        replica took it in time).
        """
        if self._options.stream:
            return self.stream(*args, **kwargs)
        engines.warn_if_on_a_loop(f"{type(self).__name__}.remote()", "`await` with a DeploymentHandle")
        background, engine, route = self._route_there()
        cell = Cell(route.codec, self._new_ref(engine, route))
        self._send(background, cell, args, kwargs, for_match=True)
        cell.wait(None, for_end=False)
        cell.raise_if_lost()
        ref = ObjectRef(cell.ref_id, cell, engine)
        if self._options.idempotency_key is not None:
            ref.share()
        return ref

    @overload
    def call(self: "SyncHandle[Async[R]]", *args: Any, **kwargs: Any) -> R: ...
    @overload
    def call(self: "SyncHandle[Plain[R]]", *args: Any, **kwargs: Any) -> R: ...
    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Send a request and block for its value."""
        engines.warn_if_on_a_loop(f"{type(self).__name__}.call()", "`await` with a DeploymentHandle's call()")
        background, engine, route = self._route_there()
        cell = Cell(route.codec, self._new_ref(engine, route), is_private=self._options.idempotency_key is None)
        self._send(background, cell, args, kwargs)
        cell.wait(None)
        return cell.read()

    def stream(self: "SyncHandle[Yields[R]]", *args: Any, **kwargs: Any) -> Stream[R]:
        """Call a generator method: an iterator of its items, as they are produced.

        At most `max_ahead` of them are produced before they are read. Closing the iterator early (`close`, or dropping
        it) cancels the request. An error of the generator is raised after the items before it. TypeError (as a TaskError)
        where the method is no generator.
        """
        background, engine, route = self._route_there()
        cell = StreamCell(route, engine.new_ref(), engine, self._options.max_ahead)
        encoded = self._encode(args, kwargs).snapshot()
        background.call(self._submit, engine, route, cell, encoded, self._options.streaming)
        if (caller := context.current.get()) is not None:
            caller.sends(engine, cell)
        return Stream(cell)

    @overload
    def map(self: "SyncHandle[Async1[A, R]]", iterable: Several[A], **how: Unpack[Choices]) -> Iterator[R]: ...
    @overload
    def map(self: "SyncHandle[Plain1[A, R]]", iterable: Several[A], **how: Unpack[Choices]) -> Iterator[R]: ...
    @overload
    def map(self: "SyncHandle[Async1[A, R]]", iterable: Several[A], **how: Unpack[Collecting]) -> Mixed[R]: ...
    @overload
    def map(self: "SyncHandle[Plain1[A, R]]", iterable: Several[A], **how: Unpack[Collecting]) -> Mixed[R]: ...
    def map(self: "SyncHandle[Any]", iterable: Several[Any], **how: Any) -> Iterator[Any]:
        """As `mapping.sync_map` says: an iterator of the values of one call per item."""
        return mapping.sync_map(self, iterable, **how)

    starmap = mapping.sync_starmap

    @overload
    def map_refs(self: "SyncHandle[Async1[A, R]]", items: Several[A]) -> list[ObjectRef[R]]: ...
    @overload
    def map_refs(self: "SyncHandle[Plain1[A, R]]", items: Several[A]) -> list[ObjectRef[R]]: ...
    def map_refs(self: "SyncHandle[Any]", items: Several[Any]) -> list[ObjectRef[Any]]:
        """As `map_refs.sync_map_refs` says: the refs of one request per item, once the server has them all."""
        return map_refs.sync_map_refs(self, items)

    def _send(
        self,
        background: engines.Background,
        pending: Pending,
        args: Any,
        kwargs: Any,
        *,
        for_match: bool = False,
        until_queued: bool = False,
        snapshot: bool = False,
    ) -> None:
        engine = background.engine
        route = engine.route(self._tag)
        until_queued = until_queued or (for_match and self._options.block_until == "queued")
        extras = self._matched_extras if for_match and not until_queued else self._plain
        caller = context.current.get()
        encoded = self._encode_quickly(args, kwargs, caller)
        if isinstance(encoded, bytes):
            background.call(self._submit_plain, engine, route, pending, encoded, extras, until_queued)
        else:
            if snapshot:
                encoded = encoded.snapshot()
            background.call(self._submit, engine, route, pending, encoded, extras, until_queued)
        if caller is not None and self._options.idempotency_key is None:
            caller.sends(engine, pending)  # it ends with its caller; one with a key may be somebody else's, too

    def _way(self) -> tuple[Engine, Route]:
        return self._route_there()[1:]

    def _send_plain_rows(
        self, engine: Engine, route: Route, pendings: list[Pending], requests: list[Any], until_queued: bool
    ) -> None:
        engine.loop.call_soon_threadsafe(engine.sender.submit_all, route, pendings, requests, until_queued)

    def _send_row(self, pending: Pending, row: Row, until_queued: bool) -> None:
        self._send(engines.background(), pending, row, {}, until_queued=until_queued, snapshot=True)

    def _route_there(self) -> tuple[engines.Background, Engine, Route]:
        background = engines.background()
        return background, background.engine, background.engine.route(self._tag)


if TYPE_CHECKING:  # what options(stream=True) gives: a kind of its own, because its `remote` is `stream`

    class _Streaming(DeploymentHandle[T_co]):
        def remote(self: "_Streaming[Yields[R]]", *args: Any, **kwargs: Any) -> AsyncStream[R]: ...  # type: ignore[override]
        def __getattr__(self, name: str) -> "_Streaming[Any]": ...

    class _SyncStreaming(SyncHandle[T_co]):
        def remote(self: "_SyncStreaming[Yields[R]]", *args: Any, **kwargs: Any) -> Stream[R]: ...  # type: ignore[override]
        def __getattr__(self, name: str) -> "_SyncStreaming[Any]": ...
