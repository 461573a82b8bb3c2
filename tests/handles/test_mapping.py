"""`map`: many requests, a bounded number of them under way, in order or as they complete."""

import asyncio
import pickle
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import anyio
import pytest

from millstream.broker.codec import codec_for
from millstream.errors import ConfigError, DeploymentNotFoundError, SerializationError
from millstream.handles import mapping, sending
from millstream.handles.handle import DeploymentHandle, SyncHandle
from millstream.handles.item import Item
from millstream.handles.sending import Make, P, Row
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Serving


class Model:
    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate or Gate()

    async def __call__(self, x: int) -> int:
        return 2 * x

    async def held_if_even(self, x: int) -> int:
        if x % 2 == 0:
            await self._gate.wait()
        return x

    async def fail_at_three(self, x: int) -> int:
        if x == 3:
            raise ValueError("three")
        return x


class Counted:
    """Items, and how many of them were taken."""

    def __init__(self, count: int) -> None:
        self._count, self.taken = count, 0

    def __iter__(self) -> Iterator[int]:
        for x in range(self._count):
            self.taken += 1
            yield x

    async def aiter(self) -> AsyncIterator[int]:
        for x in self:
            await asyncio.sleep(0)
            yield x


async def collect(values: AsyncIterator[Any], into: list[Any] | None = None) -> list[Any]:
    collected: list[Any] = [] if into is None else into
    async for value in values:
        collected.append(value)
    return collected


@pytest.mark.anyio
@pytest.mark.parametrize("max_in_flight", [1, 7, 1000])
async def test_values_come_in_the_order_of_the_items(serving: Serving, max_in_flight: int) -> None:
    handle = serving(Model, replicas=2)

    assert await collect(handle.map(range(300), max_in_flight=max_in_flight)) == [2 * x for x in range(300)]
    assert await collect(handle.map(Counted(30).aiter(), max_in_flight=max_in_flight)) == [2 * x for x in range(30)]


@pytest.mark.parametrize("max_in_flight", [1, 7, 1000])
def test_values_come_in_the_order_of_the_items_for_blocking_callers(serving: Serving, max_in_flight: int) -> None:
    handle = serving.sync(Model, replicas=2)

    assert list(handle.map(range(300), max_in_flight=max_in_flight)) == [2 * x for x in range(300)]


@pytest.mark.anyio
async def test_values_come_as_they_complete_on_request(serving: Serving) -> None:
    gate = Gate()
    values: list[int] = []
    mapping = serving(Model, gate).held_if_even.map(range(10), ordered=False)
    collecting = asyncio.create_task(collect(mapping, values))

    await wait_until(lambda: sorted(values) == [1, 3, 5, 7, 9])
    gate.open()

    assert sorted(await collecting) == list(range(10))


def test_values_come_as_they_complete_for_blocking_callers(serving: Serving) -> None:
    gate = Gate()
    mapping = serving.sync(Model, gate).held_if_even.map(range(10), ordered=False)

    first = [next(mapping) for _ in range(5)]
    gate.open()

    assert sorted(first) == [1, 3, 5, 7, 9]
    assert sorted(mapping) == [0, 2, 4, 6, 8]


@pytest.mark.anyio
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
async def test_no_more_than_so_many_are_under_way_and_items_are_taken_as_needed(
    serving: Serving, ordered: bool, is_async: bool
) -> None:
    gate, items = Gate(), Counted(20)

    async def held(x: int) -> int:
        await gate.wait()
        return x

    source: Any = items.aiter() if is_async else items
    collecting = asyncio.create_task(collect(serving(held).map(source, max_in_flight=4, ordered=ordered)))
    await wait_until(lambda: gate.inside == 4)
    with anyio.move_on_after(0.05):
        await asyncio.shield(collecting)

    assert (gate.inside, items.taken) == (4, 4)
    gate.open()
    assert sorted(await collecting) == list(range(20))
    assert gate.most <= 4


@pytest.mark.parametrize("ordered", [False, True])
def test_blocking_callers_have_no_more_than_so_many_under_way(serving: Serving, ordered: bool) -> None:
    gate, items = Gate(), Counted(20)

    async def held(x: int) -> int:
        await gate.wait()
        return x

    gate.open()
    mapping = serving.sync(held).map(items, max_in_flight=4, ordered=ordered)
    assert items.taken == 0
    next(mapping)

    assert items.taken == 4
    assert len(list(mapping)) == 19
    assert gate.most <= 4


@pytest.mark.anyio
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("are_awaited", [True, False])
@pytest.mark.parametrize("most", [1, 10, 64])
async def test_as_many_as_may_be_are_under_way_while_values_are_waited_for(
    ordered: bool, are_awaited: bool, most: int
) -> None:
    """A batch of that size is always filled."""
    codec = codec_for(b"k" * 32, "ms", "app.Model")
    waiting: list[Item] = []

    class Handle:
        def call(self, *args: Any, **kwargs: Any) -> asyncio.Future[int]:
            raise AssertionError("it is of no use here")

        def _send_rows(
            self, rows: list[Row], first: int, make: Make[P], sent: list[P], *, until_queued: bool = False
        ) -> None:
            for number, (item,) in enumerate(rows, first):
                ref = b"%022d" % number
                pending = make(codec, ref, 0.0, number)
                sent.append(pending)
                waiting.append(cast(Item, pending))
                if len(waiting) == most:
                    for one in waiting:
                        one.settle(b"succeeded normal 1-0\n" + codec.seal_value(one.ref, pickle.dumps(item)))
                    waiting.clear()

    async def items() -> AsyncIterator[int]:
        for x in range(most * 5):
            yield x

    values = mapping.async_map(
        Handle(), items() if are_awaited else range(most * 5), max_in_flight=most, ordered=ordered
    )

    assert len(await asyncio.wait_for(collect(values), 5)) == most * 5


@pytest.mark.anyio
async def test_slow_items_do_not_wait_for_each_other(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "ROWS_S", 0.0)
    handle, sizes = serving(Model), list[int]()
    send = handle._send_rows

    def noting(rows: list[Row], first: int, make: Make[P], sent: list[P], **how: bool) -> None:
        sizes.append(len(rows))
        send(rows, first, make, sent, **how)

    monkeypatch.setattr(handle, "_send_rows", noting)

    assert await collect(handle.map(range(10))) == [2 * x for x in range(10)]
    assert set(sizes) == {1}


@pytest.mark.anyio
async def test_items_that_need_care_are_sent_among_the_others(serving: Serving) -> None:
    handle = serving(Model)
    items = [1, handle.remote(2), 3, await handle.remote(4), 5]
    large = [b"x" * 100_000, b"", b"x" * 100_000]

    assert await collect(handle.map(items)) == [2, 8, 6, 16, 10]
    assert await collect(handle.map(large)) == [2 * item for item in large]
    assert await collect(handle.starmap([[1], (2,)])) == [2, 4]
    with pytest.raises(TypeError, match="not iterable"):
        await collect(handle.starmap([[1], 2]))  # type: ignore[list-item]


@pytest.mark.anyio
async def test_first_error_is_raised_in_its_place_and_ends_the_iteration(serving: Serving) -> None:
    values: list[int] = []
    mapping = serving(Model).fail_at_three.map(range(10))

    with pytest.raises(ValueError, match="three"):
        await collect(mapping, values)

    assert values == [0, 1, 2]
    assert await collect(mapping) == []


def test_first_error_is_raised_in_its_place_for_blocking_callers(serving: Serving) -> None:
    mapping = serving.sync(Model).fail_at_three.map(range(10))

    values = [next(mapping) for _ in range(3)]
    with pytest.raises(ValueError, match="three"):
        next(mapping)

    assert values == [0, 1, 2]
    assert list(mapping) == []


@pytest.mark.anyio
async def test_first_error_is_raised_as_it_comes_when_order_does_not_matter(serving: Serving) -> None:
    handle = serving(Model)

    with pytest.raises(ValueError, match="three"):
        await collect(handle.fail_at_three.map(range(10), ordered=False))
    with pytest.raises(ValueError, match="three"):
        list(
            await asyncio.to_thread(lambda: list(SyncHandle("Model", "app").fail_at_three.map(range(9), ordered=False)))
        )


@pytest.mark.anyio
async def test_item_that_cannot_be_pickled_ends_the_iteration_and_reports_no_forgotten_errors(
    serving: Serving,
) -> None:
    with pytest.raises(SerializationError):
        await collect(serving(Model).fail_at_three.map([1, (x for x in "a")]))
    with pytest.raises(DeploymentNotFoundError):
        await collect(DeploymentHandle("Nobody", "app").map(range(10)))


@pytest.mark.anyio
async def test_iteration_can_be_left_early(serving: Serving) -> None:
    async for value in serving(Model).map(range(1000), max_in_flight=10):
        if value == 4:
            break


@pytest.mark.anyio
async def test_nothing_gives_nothing(serving: Serving) -> None:
    handle = serving(Model)

    assert await collect(handle.map([])) == await collect(handle.map([], ordered=False)) == []


@pytest.mark.parametrize("most", [0, -1, 1.5, None])
def test_impossible_bound_is_refused_at_once(most: Any) -> None:
    for handle in (DeploymentHandle("Model"), SyncHandle("Model")):
        with pytest.raises(ConfigError, match=r"max_in_flight=.* must be a whole number, 1 or more"):
            handle.map([1], max_in_flight=most)


@pytest.mark.anyio
async def test_progress_counts_what_is_done(serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    handle = serving(Model)

    assert await collect(handle.map(range(5), progress=True)) == [0, 2, 4, 6, 8]
    assert "5/5" in capsys.readouterr().out
    assert await collect(handle.map((x for x in range(5)), progress=True)) == [0, 2, 4, 6, 8]
    assert "5/?" in capsys.readouterr().out


def test_progress_counts_for_blocking_callers(serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(serving.sync(Model).map([1, 2], progress=True)) == [2, 4]
    assert "2/2" in capsys.readouterr().out
