"""One request of a `map`: of a cell it has what its one reader needs, and no lock."""

from collections.abc import Callable
from typing import Any

from millstream.broker import outcomes
from millstream.broker.codec import Codec, Verified
from millstream.errors import MillstreamError

Tell = Callable[["Item"], None]


class Item:
    """Filled by the engine, which then calls `tell` in its own thread. `is_over` is the last that it sets before."""

    __slots__ = ("_error", "_large", "_stored", "_tell", "codec", "is_over", "is_private", "number", "ref", "since")

    def __init__(self, tell: Tell, codec: Codec, ref: bytes, since: float, number: int) -> None:
        self._tell, self.codec, self.ref, self.since = tell, codec, ref, since
        self.number = number  # among those of its map
        self.is_over, self.is_private = False, True
        self._stored: bytes | None = None
        self._large: Verified | None = None  # the value, where it lies in a key of its own
        self._error: BaseException | None = None

    def settle(self, stored: bytes, large: Verified | None = None) -> None:
        if not self.is_over:
            self._stored, self._large, self.is_over = stored, large, True
            self._tell(self)

    def fail(self, error: BaseException) -> None:
        if not self.is_over:
            self._error, self.is_over = error, True
            self._tell(self)

    def match(self) -> None:
        pass

    def item(self, stored: bytes) -> None:
        pass

    def look_again(self) -> bool:
        return False

    def read(self) -> Any:
        """The value, or the error raised. Only after the end, and once."""
        stored = self._stored
        if stored is None:
            assert self._error is not None
            raise self._error
        try:
            return outcomes.open_stored(self.codec, self.ref, stored, self._large)
        except MillstreamError as e:
            raise e.with_traceback(None)  # noqa: B904 - it is the same one, without how we rebuilt it
