"""The traceback of a user's exception as text: from the first frame of the user's on, chained causes and groups included."""

import itertools
import os
import pickle
import traceback
from collections.abc import Iterator

from millstream.errors import MillstreamError

MOST_TEXT = 32_000  # characters: a record of an error goes through a script, and is read by people
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_MACHINERY = tuple(
    f"{os.sep}{name}{os.sep}" for name in ("asyncio", "importlib", "uvloop", os.path.join("concurrent", "futures"))
)
# What we raise ourselves before any code of the user runs: where in our files that was tells nobody anything.
_SAY_IT_ALL = (MillstreamError, TypeError, ImportError, AttributeError, pickle.UnpicklingError)


def user_traceback(error: BaseException) -> str:
    """The traceback without our frames around the user's. Without any frame, only the error's last line or lines."""
    try:
        formatted = traceback.TracebackException.from_exception(error)
        for one, raised in _all_of(formatted, error):
            _leave_our_frames_out(one, raised)
        return shortened("".join(formatted.format()))
    except Exception:  # a __str__ or __repr__ of the user's raised inside
        return f"{type(error).__name__} (its traceback could not be formatted)\n"


def shortened(text: str, most: int = MOST_TEXT) -> str:
    """Its beginning and its end, where it is longer than `most`."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\n... {len(text) - most:,} characters left out ...\n{text[-most // 2 :]}"


def _all_of(
    formatted: traceback.TracebackException, error: BaseException
) -> Iterator[tuple[traceback.TracebackException, BaseException]]:
    """A traceback and all those inside it, each with its exception: they are built alike."""
    pairs: list[tuple[traceback.TracebackException | None, BaseException | None]] = [(formatted, error)]
    while pairs:
        one, raised = pairs.pop()
        if one is None or raised is None:
            continue
        yield one, raised
        pairs += [(one.__cause__, raised.__cause__), (one.__context__, raised.__context__)]
        if one.exceptions and isinstance(raised, BaseExceptionGroup):
            pairs += zip(one.exceptions, raised.exceptions, strict=False)


def _leave_our_frames_out(one: traceback.TracebackException, error: BaseException) -> None:
    """What led to the user's code goes; after it, what raised an error of ours: the line that called us is enough."""
    frames = list(itertools.dropwhile(lambda frame: _is_machinery(frame.filename), one.stack))
    if not frames:
        if isinstance(error, _SAY_IT_ALL):
            one.stack = None  # type: ignore[assignment] # then no "Traceback" stands above it either
        return
    if isinstance(error, MillstreamError):
        while frames[-1].filename.startswith(_OURS):
            frames.pop()
    one.stack = traceback.StackSummary.from_list(frames)


def _is_machinery(filename: str) -> bool:
    """Is this what led to the user's code: ours, the event loop, the import system?"""
    return filename.startswith((_OURS, "<frozen")) or any(part in filename for part in _MACHINERY)
