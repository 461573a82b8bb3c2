"""What both handles are: the name of a deployment, the options, and the way of one request to the engine."""

import functools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, Self

from millstream.broker import pickling
from millstream.broker.keys import deployment_tag
from millstream.handles import arguments, context, engines
from millstream.handles.engine import Engine
from millstream.handles.options import HandleOptions, checked
from millstream.handles.route import FIELDS, Pending, Request, Route
from millstream.handles.sending import CANNOT_BE_SENT, Make, P, Row, named


class BaseHandle:
    """What both handles are: a deployment's name, and options."""

    def __init__(self, deployment_name: str, app_name: str = "default", options: HandleOptions | None = None) -> None:
        self._app, self._deployment = app_name, deployment_name
        self._options = options or HandleOptions()
        self._tag = deployment_tag(app_name, deployment_name)
        self._method = self._options.method_name.encode()
        self._lane = self._options.priority.encode()
        self._plain, self._matched_extras = self._options.plain, self._options.matched
        self._is_patient = self._options.when_full == "wait"
        self._is_simple = not self._is_patient and not (
            self._options.delay_s or self._options.eta or self._options.idempotency_key or self._options.timeout_s
        )
        self._is_plain = self._is_simple and not self._options.multiplexed_model_id
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
        """A copy with other options, those of `HandleOptions`. TypeError for an unknown one, ConfigError for a bad value."""
        return type(self)(self._deployment, self._app, replace(self._options, **checked(options)))

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
        made = type(self), self._deployment, self._app, self._options
        settings = engines.settings_for_child()
        return (made[0], made[1:]) if settings is None else (engines.made_in_child, (settings, *made))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BaseHandle):
            return NotImplemented
        return type(self) is type(other) and (self._tag, self._options) == (other._tag, other._options)

    def __hash__(self) -> int:
        return hash((self._tag, self._options))

    if not TYPE_CHECKING:  # for type checkers it is an error that there is no such method

        def __call__(self, *_: Any, **__: Any) -> NoReturn:
            raise TypeError(f"a handle is not called itself: write {self._deployment}.remote(...) or .call(...)")

    def _encode_quickly(self, args: Any, kwargs: Any, caller: context.Request | None) -> bytes | arguments.Arguments:
        """The arguments of a request that is sent in one step, as most are, as they are pickled; of others as `_encode`."""
        if self._is_plain and (caller is None or not caller.model_id):
            body = arguments.encode_plain(args, kwargs)
            if body is not None:
                if len(body) <= pickling.LARGE_BYTES:
                    return body
                return arguments.Arguments(pickling.large(body, self._what), [], [])
        return self._encode(args, kwargs)

    def _encode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> arguments.Arguments:
        model_id = self._options.multiplexed_model_id
        if not model_id and (caller := context.current.get()) is not None:
            model_id = caller.model_id  # a request passes it on
        return arguments.encode(self._what, args, kwargs, model_id)

    def _new_ref(self, engine: Engine, route: Route) -> bytes:
        key = self._options.idempotency_key
        return engine.new_ref() if key is None else route.codec.ref_of_key(key)

    def _of_item(self, number: int) -> Self:
        """For one item of a map: with one key for all of them, they would all be the first one."""
        key = self._options.idempotency_key
        return self if key is None else self.options(idempotency_key=f"{key}[{number}]")

    def _send_rows(
        self, rows: list[Row], first: int, make: Make[P], sent: list[P], *, until_queued: bool = False
    ) -> None:
        """Make one request of each row of arguments, in a fraction of the time that as many calls take; append to `sent` who
        waits for each. The rows count from `first`. Options for one request at a time (its key) are completed by that."""
        engine, route = self._way()
        caller = context.current.get()
        is_plain = self._is_plain and (caller is None or not caller.model_id)
        bodies = arguments.encode_rows(rows) if is_plain else [None] * len(rows)
        codec, seal, now = route.codec, route.sealer(self._method), engine.now()
        refs = engine.new_refs(len(rows))
        pendings = [make(codec, ref, now, number) for number, ref in enumerate(refs, first)]
        sent += pendings
        plain: list[Pending] = [*pendings]
        if None in bodies:
            plain = [pending for pending, body in zip(pendings, bodies, strict=True) if body is not None]
            refs = [pending.ref for pending in plain]
        if plain:
            requests: list[Any] = [None, self._lane, self._method, self._plain, None] * len(
                plain
            )  # flat: FIELDS of each
            requests[::FIELDS] = refs
            requests[FIELDS - 1 :: FIELDS] = map(seal, refs, filter(None, bodies))
            self._send_plain_rows(engine, route, plain, requests, until_queued)
            if caller is not None:
                for one in plain:
                    caller.sends(engine, one)
        if len(plain) == len(rows):
            return
        for position, (row, body) in enumerate(zip(rows, bodies, strict=True)):
            if body is None:
                try:
                    self._send_with_number(engine, route, sent[position], row, first + position, until_queued)
                except Exception:
                    del sent[position:]
                    raise

    def _send_with_number(
        self, engine: Engine, route: Route, pending: Pending, row: Row, number: int, until_queued: bool
    ) -> None:
        handle = self._of_item(number)
        if self._options.idempotency_key is not None:
            pending.ref, pending.is_private = handle._new_ref(engine, route), False
        try:
            handle._send_row(pending, row, until_queued)
        except CANNOT_BE_SENT as e:
            pending.fail(named(e, number))

    def _way(self) -> tuple[Engine, Route]:
        """The engine that serves this handle here and now, and its route to the deployment."""
        raise NotImplementedError

    def _send_plain_rows(
        self, engine: Engine, route: Route, pendings: list[Pending], requests: list[Any], until_queued: bool
    ) -> None:
        """Submit flat requests, which take nothing special."""
        raise NotImplementedError

    def _send_row(self, pending: Pending, row: Row, until_queued: bool) -> None:
        """Submit one request of any kind."""
        raise NotImplementedError

    def _submit_plain(
        self, engine: Engine, route: Route, pending: Pending, body: bytes, extras: bytes, until_queued: bool = False
    ) -> None:
        """Hand one request to the engine; on its loop."""
        envelope = route.sealer(self._method)(pending.ref, body)
        engine.submit(route, pending, self._lane, self._method, extras, envelope, until_queued)

    def _submit(
        self,
        engine: Engine,
        route: Route,
        pending: Pending,
        encoded: arguments.Arguments,
        extras: bytes,
        until_queued: bool = False,
    ) -> None:
        """As `_submit_plain`, of any kind."""
        if self._is_simple and type(encoded.body) is bytes and not encoded.depends_on and not encoded.mentions:
            self._submit_plain(engine, route, pending, encoded.body, extras, until_queued)
        else:
            self._submit_with_care(engine, route, pending, encoded, extras, until_queued)

    def _submit_with_care(
        self,
        engine: Engine,
        route: Route,
        pending: Pending,
        encoded: arguments.Arguments,
        extras: bytes,
        until_queued: bool,
    ) -> None:
        options, ref = self._options, pending.ref
        if options.idempotency_key is not None:
            pending = engine.join(pending)
        request = Request(
            route, pending, self._lane, self._method, extras, b"", until_queued,
            depends_on=[ref.id for ref in encoded.depends_on], mentions=[ref.id for ref in encoded.mentions],
            delay_ms=math.ceil(options.delay_s * 1000), due_ms=options.due_ms,
        )  # fmt: skip
        if isinstance(encoded.body, bytes):
            request.envelope = route.codec.seal("request", ref, encoded.body, self._method)
        else:
            request.arguments, request.is_shared = encoded.body, options.idempotency_key is not None
        if request.must_wait or request.mentions or request.arguments or engine.chores.is_sending(ref):
            for upstream in (*encoded.depends_on, *encoded.mentions):
                upstream._send_ahead(engine)
            engine.chores.send(request)
            for upstream in encoded.depends_on:
                upstream._if_never_sent(functools.partial(engine.give_up, route, ref))
        else:
            send = engine.sender.submit_patiently if self._is_patient else engine.submit
            send(route, pending, self._lane, self._method, extras, request.envelope, until_queued)
        if options.timeout_s is not None:
            engine.deadlines.add(route.tag, ref, options.timeout_s)
