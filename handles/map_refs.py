"""`map_refs` of both handles: one request per item, as fast as the server takes them, and their refs."""

from collections.abc import AsyncIterable, Iterable
from typing import Any, Protocol

from millstream.broker.codec import Codec
from millstream.handles import engines
from millstream.handles.cell import Cell
from millstream.handles.engine import Engine
from millstream.handles.options import HandleOptions
from millstream.handles.ref import ObjectRef
from millstream.handles.route import Route
from millstream.handles.sending import AsyncSource, SendsRows, Source, refuse_async

UNCONFIRMED = 4096  # so many are on their way at a time


class _Sends(SendsRows, Protocol):
    _options: HandleOptions

    def _way(self) -> tuple[Engine, Route]: ...


class _Refs:
    """What has been sent, and how much of it the server has."""

    def __init__(self, handle: _Sends) -> None:
        self.refs: list[ObjectRef] = []
        self._cells: list[Cell] = []
        self._confirmed = 0
        self._engine = handle._way()[0]
        self._is_shared = handle._options.idempotency_key is not None

    def add(self, cells: list[Cell]) -> None:
        engine, prefix = self._engine, f"{cells[0].codec.tag}~"
        refs = [ObjectRef(prefix + cell.ref.decode(), cell, engine) for cell in cells]
        if self._is_shared:
            for ref in refs:
                ref.share()
        self.refs += refs
        self._cells += cells

    def next_unconfirmed(self, most: int) -> Cell | None:
        """The first that the server may not have, if there are more than `most` of them. Raises if it never will."""
        cells, count = self._cells, len(self._cells)
        while count - self._confirmed > most:
            cell = cells[self._confirmed]
            if not cell.is_matched:
                return cell
            if not cell.has_ended:
                self._confirmed += 1
                continue
            try:
                cell.raise_if_lost()
            except Exception as e:
                e.add_note(f"(item {self._confirmed} of map_refs(); those before it are with the server)")
                raise
            self._confirmed += 1
        return None


def sync_map_refs(self: _Sends, iterable: Iterable[Any]) -> list[ObjectRef[Any]]:
    """Send one request per item. Their refs, in the order of the items, once the server has them all.

    From then on they run, whatever becomes of the caller. It holds a ref for each item: for very many, whose values are
    wanted here, `map` takes less memory. Raises the first error of the items themselves, of an item that cannot be sent,
    or of one that the server refuses (BackPressureError where the queue is full, say): those before it run nevertheless.
    An `idempotency_key` is completed by the number of the item.
    """
    refuse_async(iterable)
    engines.warn_if_on_a_loop("SyncHandle.map_refs()", "`await` with a DeploymentHandle's map_refs()", depth=4)
    source, sent = Source(self, lambda item: (item,), iterable), _Refs(self)
    while cells := source.send(UNCONFIRMED, _cell, until_queued=True):
        sent.add(cells)
        while (cell := sent.next_unconfirmed(UNCONFIRMED)) is not None:
            cell.wait(None, for_end=False)
    while (cell := sent.next_unconfirmed(0)) is not None:
        cell.wait(None, for_end=False)
    source.finish()
    return sent.refs


async def async_map_refs(self: _Sends, iterable: Iterable[Any] | AsyncIterable[Any]) -> list[ObjectRef[Any]]:
    """Send one request per item. Their refs, in the order of the items, once the server has them all.

    From then on they run, whatever becomes of the caller. It holds a ref for each item: for very many, whose values are
    wanted here, `map` takes less memory. Raises the first error of the items themselves, of an item that cannot be sent,
    or of one that the server refuses (BackPressureError where the queue is full, say): those before it run nevertheless.
    An `idempotency_key` is completed by the number of the item.
    """
    loop = engines.loop_here("map_refs()")
    source, sent = AsyncSource(self, lambda item: (item,), iterable), _Refs(self)
    while cells := await source.send_soon(UNCONFIRMED, _cell, until_queued=True):
        sent.add(cells)
        while (cell := sent.next_unconfirmed(UNCONFIRMED)) is not None:
            await cell.future(loop, for_end=False)
    while (cell := sent.next_unconfirmed(0)) is not None:
        await cell.future(loop, for_end=False)
    source.finish()
    return sent.refs


def _cell(codec: Codec, ref: bytes, since: float, number: int) -> Cell:
    return Cell(codec, ref, since=since)
