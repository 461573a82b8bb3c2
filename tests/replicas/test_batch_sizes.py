"""`batch_size_fn`: batches measured by what is in them, not by the number of their calls."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from millstream import serve
from tests.replicas.batched import NEVER_S, passes, start, together

pytestmark = pytest.mark.anyio


def total(items: list[int]) -> int:
    return sum(items)


async def sizes(limit: int, items: list[int], weigh: Callable[[list[int]], float] = total) -> Any:
    """The batches that calls of these sizes make, and what the calls get."""
    batches = []

    @serve.batch(max_batch_size=limit, batch_wait_timeout_s=0.005, batch_size_fn=weigh)
    async def function(xs: list[int]) -> list[int]:
        batches.append(xs)
        return xs

    outcomes = await asyncio.gather(*(function(x) for x in items), return_exceptions=True)
    return batches, outcomes


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([5, 6, 7], [[5, 6, 7]]),
        ([12, 8, 1], [[12, 8], [1]]),
        ([12, 12, 8], [[12], [12, 8]]),
        ([20, 1, 19], [[20], [1, 19]]),
    ],
)
async def test_batch_is_full_when_the_next_item_does_not_fit(items: list[int], expected: Any) -> None:
    batches, outcomes = await sizes(20, items)

    assert batches == expected and outcomes == items


async def test_item_larger_than_a_batch_is_refused_and_the_others_go_on() -> None:
    batches, outcomes = await sizes(10, [6, 12, 4])

    assert batches == [[6, 4]]
    assert isinstance(outcomes[1], RuntimeError) and "size 12 is larger than max_batch_size=10" in str(outcomes[1])


async def test_item_whose_size_cannot_be_told_fails_alone() -> None:
    def weigh(items: list[int]) -> float:
        return sum(10 / item for item in items)

    batches, outcomes = await sizes(100, [1, 0, 2], weigh)

    assert batches == [[1, 2]] and isinstance(outcomes[1], ZeroDivisionError)


async def test_items_whose_size_together_cannot_be_told_do_not_go_together() -> None:
    def weigh(items: list[int]) -> int:
        (item,) = items
        return item

    batches, _ = await sizes(10, [1, 2], weigh)

    assert batches == [[1], [2]]


async def test_large_item_that_leaves_makes_room() -> None:
    batches = []

    @serve.batch(max_batch_size=10, batch_wait_timeout_s=NEVER_S, batch_size_fn=total)
    async def function(xs: list[int]) -> list[int]:
        batches.append(xs)
        return xs

    large, small = start(function(8), function(1))
    await passes()
    large.cancel()
    await asyncio.wait([large])
    await together(small, function(9))

    assert batches == [[1, 9]]
