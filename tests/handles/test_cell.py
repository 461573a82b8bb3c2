"""What a process knows of one request: filled once, read by anybody."""

import asyncio
import sys
import threading
from typing import Any

import pytest

from millstream.broker import pickling
from millstream.broker.codec import codec_for
from millstream.errors import BrokerUnavailableError, DeploymentNotFoundError
from millstream.handles.cell import Cell
from tests.helpers import wait_until

CODEC = codec_for(b"a secret for tests", "ms", "app.Model")
REF = b"r" * 22


def new_cell() -> Cell:
    return Cell(CODEC, REF)


def stored(value: object) -> bytes:
    return b"succeeded normal 1-0\n" + CODEC.seal("value", REF, pickling.dump(value, "a value"))


def test_cell_is_filled_once() -> None:
    cell = new_cell()

    cell.settle(stored(1))
    cell.settle(stored(2))
    cell.fail(ValueError())

    assert cell.read() == 1
    assert cell.ref_id == "app.Model~" + "r" * 22


def test_every_read_gives_the_same_value() -> None:
    cell = new_cell()
    cell.settle(stored([1]))

    assert cell.read() is cell.read()
    assert cell.error() is None


def test_value_is_read_by_several_threads_at_once() -> None:
    cells = [new_cell() for _ in range(300)]
    for cell in cells:
        cell.settle(stored(1))
    values: list[int] = []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=lambda: values.extend(cell.read() for cell in cells)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)

    assert values == [1] * 1800


def test_match_comes_before_the_end_and_the_end_is_a_match() -> None:
    matched, ended = new_cell(), new_cell()
    assert not matched.is_matched

    matched.match()
    matched.match()
    ended.settle(stored(1))

    assert (matched.is_matched, matched.has_ended) == (True, False)
    assert (ended.is_matched, ended.has_ended) == (True, True)


def test_watchers_are_called_once_and_late_ones_at_once() -> None:
    cell, called = new_cell(), list[Any]()
    cell.on_match(lambda _: called.append("match"))
    cell.on_end(lambda _: called.append("end"))

    cell.match()
    assert called == ["match"]
    cell.settle(stored(1))
    assert called == ["match", "end"]

    cell.on_match(lambda _: called.append("late match"))
    cell.on_end(lambda _: called.append("late end"))
    assert called[2:] == ["late match", "late end"]


def test_forgotten_watcher_is_not_called() -> None:
    cell, called = new_cell(), list[Any]()
    cell.on_end(called.append)

    cell.forget(called.append)
    cell.forget(called.append)
    cell.settle(stored(1))

    assert called == []


def test_same_error_is_raised_anew_for_each_reader() -> None:
    cell = new_cell()
    cell.fail(DeploymentNotFoundError("none", app="app", deployment="Model"))

    first, second = cell.error(), cell.error()

    assert isinstance(first, DeploymentNotFoundError) and first.deployment == "Model"
    assert first is not second


def test_cell_tells_a_request_that_was_never_sent_from_a_connection_that_ended() -> None:
    refused, cut_off, ended = new_cell(), new_cell(), new_cell()
    refused.fail(DeploymentNotFoundError("none"))
    cut_off.fail(BrokerUnavailableError("closed"))
    ended.settle(stored(1))

    assert isinstance(refused.unsent_error, DeploymentNotFoundError) and not refused.was_cut_off
    assert cut_off.unsent_error is None and cut_off.was_cut_off
    assert ended.unsent_error is None and not ended.was_cut_off


@pytest.mark.parametrize("timeout", [None, 5.0, float("inf")])
def test_wait_ends_with_the_request(timeout: float | None) -> None:
    cell = new_cell()
    timer = threading.Timer(0.01, cell.settle, [stored(1)])
    timer.start()

    assert cell.wait(timeout)
    assert cell.wait(0)
    timer.join()


@pytest.mark.parametrize("timeout", [0.01, 0, -1])
def test_wait_that_takes_too_long_says_so_and_leaves_no_watcher(timeout: float) -> None:
    cell = new_cell()

    assert not cell.wait(timeout)
    assert not cell.wait(timeout, for_end=False)
    assert (cell._on_end, cell._on_match) == ((), ())


@pytest.mark.anyio
async def test_future_is_done_in_its_loop_whoever_fills_the_cell() -> None:
    here, elsewhere = new_cell(), new_cell()
    futures = [cell.future(asyncio.get_running_loop()) for cell in (here, elsewhere)]

    here.settle(stored(1))
    thread = threading.Thread(target=elsewhere.settle, args=[stored(2)])
    thread.start()

    await asyncio.wait_for(asyncio.gather(*futures), 5)
    thread.join()


@pytest.mark.anyio
async def test_cancelled_future_leaves_no_watcher() -> None:
    cell = new_cell()
    future = cell.future(asyncio.get_running_loop())

    future.cancel()

    await wait_until(lambda: cell._on_end == ())
    cell.settle(stored(1))


def test_cell_can_be_filled_after_the_loop_that_waited_is_gone() -> None:
    cell = new_cell()

    async def start_waiting() -> None:
        cell.future(asyncio.get_running_loop())

    asyncio.run(start_waiting())
    thread = threading.Thread(target=cell.settle, args=[stored(1)])
    thread.start()
    thread.join()

    assert cell.read() == 1
