"""Frees the results that nobody can ask for any more: of requests whose ref was never shared and is gone, or was never made.

Results are deleted in batches, a moment later. Where a submit may be sent twice, after a lost connection or by another
engine, they are left to their TTL: the second must find the result of the first.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

from millstream.broker import outcomes
from millstream.handles.cell import Cell
from millstream.handles.lines import Lines
from millstream.handles.route import Route

T = TypeVar("T")
AT_ONCE = 500  # keys in one command: more would stall the server


class Drops:
    """Collects refs, from any thread; `flush` belongs to the engine's loop."""

    def __init__(self, lines: Lines, route: Callable[[str], Route]) -> None:
        self._lines, self._route = lines, route
        self._dropped: deque[tuple[str, list[bytes]]] = deque()  # tag, refs
        self._large: deque[tuple[str, str, str]] = deque()  # tag, ref, part: values in keys of their own
        self._abandoned: deque[Cell] = deque()
        self.sure_after = 0.0  # requests made up to then may have been sent over another connection, too

    def add(self, tag: str, ref: bytes, stored: bytes, since: float) -> None:
        """The result of one request, made at `since`, has been read, or will never be. Any thread."""
        if since <= self.sure_after:
            return
        self._dropped.append((tag, [ref]))
        if (part := outcomes.large_part(stored)) is not None:
            self._large.append((tag, ref.decode(), part))

    def add_all(self, tag: str, refs: list[bytes]) -> None:
        """As `add`, for small results of requests made after `sure_after`."""
        self._dropped.append((tag, refs))

    def abandon(self, cell: Cell) -> None:
        """The last ref to a request of this process is gone: free its result, once it has one. Any thread."""
        self._abandoned.append(cell)

    def may_be_sent_twice(self, made_until: float) -> None:
        """Keep the results of what was made up to then. For who has lost the answer to a submit, or lets another send it
        (which looks after this for what is pending still). Any thread."""
        self.sure_after = max(self.sure_after, made_until)
        self._dropped.clear()
        self._large.clear()

    def flush(self) -> None:
        """Delete what was collected."""
        for cell in _taken(self._abandoned):
            cell.on_end(self._free)
        commands = self._lines.commands
        if commands is None or not commands.is_up or not (self._dropped or self._large):
            return
        by_tag: dict[str, list[bytes]] = {}
        for tag, refs in _taken(self._dropped):
            prefix = self._route(tag).result_prefix
            by_tag.setdefault(tag, []).extend([prefix + ref for ref in refs])
        for tag, ref, part in _taken(self._large):
            by_tag.setdefault(tag, []).append(self._route(tag).keys.value(ref, part).encode())
        for keys in by_tag.values():
            for i in range(0, len(keys), AT_ONCE):
                commands.send(_ignore, "UNLINK", *keys[i : i + AT_ONCE])

    def _free(self, cell: Cell) -> None:
        if cell.stored is not None:
            self.add(cell.codec.tag, cell.ref, cell.stored, cell.since)


def _taken(queue: deque[T]) -> Iterator[T]:
    """Take out what is there. Other threads may add to it, or clear it, meanwhile."""
    for _ in range(len(queue)):
        try:
            one = queue.popleft()
        except IndexError:
            return
        yield one


def _ignore(reply: object) -> None:
    """What could not be deleted has a TTL."""
