"""The future of a call's value: what `DeploymentHandle.call` returns."""

import asyncio
from typing import Any

from millstream.broker.codec import Codec, Verified
from millstream.broker.outcomes import open_stored
from millstream.errors import MillstreamError


class CallFuture(asyncio.Future[Any]):
    """Filled by the engine, as a cell is. Cancelling it does not cancel the request."""

    __slots__ = ("codec", "ref", "since")
    codec: Codec
    ref: bytes
    since: float
    is_private = True

    @property
    def is_over(self) -> bool:
        return self.done()

    def settle(self, stored: bytes, large: Verified | None = None) -> None:
        if not self.done():
            try:
                self.set_result(open_stored(self.codec, self.ref, stored, large))
            except BaseException as e:
                self.set_exception(_settable(e))

    def fail(self, error: BaseException) -> None:
        if not self.done():
            self.set_exception(error)

    def match(self) -> None:
        pass

    def item(self, stored: bytes) -> None:
        pass

    def look_again(self) -> bool:
        return False


class SharedCallFuture(CallFuture):
    """Of a request with an idempotency key: its result stays for others."""

    __slots__ = ()
    is_private = False


def _settable(error: BaseException) -> BaseException:
    if isinstance(error, MillstreamError):
        error.__traceback__ = None  # it would show how we rebuilt it
    # asyncio refuses to set a StopIteration: in a coroutine it would mean "return".
    return RuntimeError(f"the request raised {type(error).__name__}") if isinstance(error, StopIteration) else error
