"""The ledger: what clients and replicas have done, a line each, written before or after the deed and never lost to a SIGKILL.

A line is one `write` to a file opened for appending: whole or not there at all, whoever else writes. Times are those of
CLOCK_MONOTONIC, which all processes of a host share.
"""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Line(NamedTuple):
    """One event. What `who` and `what` are depends on the event:

    | event | who | what | more |
    |---|---|---|---|
    | `begin` | a client and its generation | pid | |
    | `submit` | request | client and generation | kind |
    | `ref` | request | ref id | |
    | `end` | request | "ok", "cancelled" or the error | token of the attempt whose value came |
    | `leave` | a client and its generation | pid | |
    | `up` | replica | pid | |
    | `start`, `raised`, `done` | request | pid | token of the attempt |
    | `accepted` | ref without its tag | the entry that finished | pid |
    """

    event: str
    at_s: float
    who: str
    what: str
    more: str


class Ledger:
    """One file. Open it in each process anew: after a fork, too, it is the same file."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, event: str, who: str, what: object = "-", more: object = "-") -> None:
        self.note_all([(event, who, what, more)])

    def note_all(self, events: Iterable[tuple[str, str, object, object]]) -> None:
        """Several events of this moment, in one write."""
        at_s = time.monotonic()
        os.write(
            self._file,
            "".join(f"{event} {at_s:.6f} {who} {what} {more}\n" for event, who, what, more in events).encode(),
        )


def read(path: Path | str, start: int = 0) -> tuple[list[Line], int]:
    """The lines from an offset on, and the offset behind the last whole one. A file that is not there is empty."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            text = file.read()
    except FileNotFoundError:
        return [], start
    whole = text[: text.rfind(b"\n") + 1]
    return [_parse(line) for line in whole.decode().splitlines()], start + len(whole)


def _parse(line: str) -> Line:
    event, at_s, who, what, more = line.split(" ")
    return Line(event, float(at_s), who, what, more)
