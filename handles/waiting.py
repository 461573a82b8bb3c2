"""`get`, `wait`, `put` and `cancel`, by Ray's rules."""

import time
from collections.abc import Sequence
from typing import Any, overload

from millstream.broker import pickling
from millstream.broker.keys import put_tag
from millstream.errors import GetTimeoutError
from millstream.handles import engines
from millstream.handles.generics import T
from millstream.handles.ref import ObjectRef

PUT_TTL_S = 3600.0


def cancel(ref: ObjectRef) -> bool:
    """`ref.cancel()`, under Ray's name. TypeError for anything but a ref."""
    if not isinstance(ref, ObjectRef):
        raise TypeError(f"cancel() takes a ref, not {type(ref).__name__}")
    return ref.cancel()


@overload
def get(refs: ObjectRef[T], *, timeout: float | None = None) -> T: ...
@overload
def get(refs: list[ObjectRef[T]], *, timeout: float | None = None) -> list[T]: ...
def get(refs: ObjectRef | list[ObjectRef[T]], *, timeout: float | None = None) -> Any:
    """Block for one value, or for a list of values in the order of the refs.

    The first failure in list order is raised, without waiting for what comes after it. GetTimeoutError after `timeout`
    seconds in all (0 polls); the requests go on. ValueError for anything but a ref or a list of refs.
    """
    if isinstance(refs, ObjectRef):
        return refs.result(timeout)
    if not isinstance(refs, list) or not all(isinstance(ref, ObjectRef) for ref in refs):
        raise ValueError(f"get() takes a ref or a list of refs, not {type(refs).__name__}")
    engines.warn_if_on_a_loop("millstream.get()", "`await ref`, or `await asyncio.gather(*refs)`")
    deadline = None if timeout is None else time.monotonic() + timeout
    cells = [ref._followed_off_loop() for ref in refs]
    values = []
    for position, cell in enumerate(cells):
        if not cell.wait(None if deadline is None else deadline - time.monotonic()):
            raise GetTimeoutError(
                f"{sum(not c.has_ended for c in cells)} of {len(refs)} requests have no result after {timeout} s, "
                f"the first is {refs[position].id}; they go on: ask again",
                ref_id=refs[position].id,
            )
        values.append(cell.read())
    return values


def wait(
    refs: list[ObjectRef[T]], *, num_returns: int = 1, timeout: float | None = None, fetch_local: bool = True
) -> tuple[list[ObjectRef[T]], list[ObjectRef[T]]]:
    """Block until `num_returns` requests have ended (failed ones count), or `timeout` seconds have passed.

    Returns (ready, not ready), both in the order of `refs`, at most `num_returns` ready. `fetch_local` is Ray's; values
    come along anyway. TypeError for a single ref, ValueError for duplicates, num_returns out of range or a negative timeout.
    """
    _check_wait(refs, num_returns, timeout)
    if not refs:
        return [], []
    engines.warn_if_on_a_loop("millstream.wait()", "`await asyncio.wait(refs)`")
    deadline = None if timeout is None else time.monotonic() + timeout
    cells = [ref._followed_off_loop() for ref in refs]
    turnstile = _Turnstile(num_returns)
    for cell in cells:
        cell.on_end(turnstile.count)
    try:
        turnstile.wait(None if deadline is None else deadline - time.monotonic())
    finally:
        for cell in cells:
            cell.forget(turnstile.count)
    ended = [ref for ref, cell in zip(refs, cells, strict=True) if cell.has_ended][:num_returns]
    chosen = set(ended)
    return ended, [ref for ref in refs if ref not in chosen]


class _Turnstile:
    """Lets a thread through after so many counts."""

    def __init__(self, counts: int) -> None:
        import threading

        self._semaphore, self._counts = threading.Semaphore(0), counts

    def count(self, _: Any) -> None:
        self._semaphore.release()

    def wait(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        for _ in range(self._counts):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._semaphore.acquire(timeout=left):
                return


def _check_wait(refs: Sequence[ObjectRef], num_returns: int, timeout: float | None) -> None:
    if isinstance(refs, ObjectRef) or not isinstance(refs, list):
        raise TypeError(f"wait() takes a list of refs, not {type(refs).__name__}")
    if not all(isinstance(ref, ObjectRef) for ref in refs):
        raise TypeError("wait() takes a list of refs; this list holds something else")
    if len(set(refs)) != len(refs):
        raise ValueError("wait() takes each ref once; this list holds one twice")
    if not isinstance(num_returns, int):
        raise TypeError(f"num_returns={num_returns!r} must be a whole number")
    if refs and not 1 <= num_returns <= len(refs):
        raise ValueError(f"num_returns={num_returns} must be 1 to the number of refs, {len(refs)}")
    if timeout is not None and timeout < 0:
        raise ValueError(f"timeout={timeout} must not be negative")


def put(value: T) -> ObjectRef[T]:
    """Store a value and return its ref: to pass it to many requests, or to read it elsewhere by id. Kept for an hour.

    Raises SerializationError, PayloadTooLargeError, BrokerUnavailableError.
    """
    engines.warn_if_on_a_loop("millstream.put()", "`await asyncio.to_thread(millstream.put, value)`")
    body = pickling.dump_parts(value, what="the value put")
    background = engines.background()
    engine = background.engine
    route, ref = engine.route(put_tag()), engine.new_ref()
    seal = route.codec.seal if isinstance(body, bytes) else route.codec.sealing
    background.run(engine.large.put(route, ref, seal("value", ref, body), PUT_TTL_S))  # type: ignore[arg-type]
    return ObjectRef.from_id(f"{route.tag}~{ref.decode()}")
