"""`map` and `starmap` in bulk: errors in their place, inputs without an end, early exits, options, and memory."""

import asyncio
import gc
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from millstream.broker import pickling
from millstream.errors import (
    DeploymentNotFoundError,
    PayloadTooLargeError,
    RequestTimeoutError,
    SerializationError,
    TaskError,
)
from millstream.handles import engines
from millstream.handles.handle import DeploymentHandle, SyncHandle
from tests.handles.test_mapping import Counted, collect
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Serving


class Model:
    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate or Gate()
        self.runs = 0

    async def __call__(self, x: Any) -> Any:
        self.runs += 1
        return x

    async def count(self) -> int:
        return self.runs

    async def add(self, x: int, y: int = 100) -> int:
        return x + y

    async def fail_on_odd(self, x: int) -> int:
        if x % 2:
            raise ValueError(f"{x} is odd")
        return x

    async def held(self, x: Any) -> Any:
        await self._gate.wait()
        return x


Mapped = Callable[..., Any]


async def on_the_loop(handle: DeploymentHandle, items: Any, **how: Any) -> list[Any]:
    return await collect(handle.map(items, **how))


async def in_a_thread(handle: DeploymentHandle, items: Any, **how: Any) -> list[Any]:
    sync = SyncHandle(handle.deployment_name, handle.app_name, handle._options)
    return await asyncio.to_thread(lambda: list(sync.map(items, **how)))


both = pytest.mark.parametrize("mapped", [on_the_loop, in_a_thread])


# errors


@pytest.mark.anyio
@pytest.mark.parametrize("ordered", [True, False])
@both
async def test_errors_are_values_on_request(serving: Serving, mapped: Mapped, ordered: bool) -> None:
    values = await mapped(serving(Model).fail_on_odd, range(50), ordered=ordered, return_exceptions=True)

    good = [value for value in values if not isinstance(value, Exception)]
    bad = [value for value in values if isinstance(value, Exception)]
    assert sorted(good) == list(range(0, 50, 2))
    assert all(isinstance(one, ValueError) and isinstance(one, TaskError) for one in bad)
    assert sorted(str(one).split()[1:4] for one in bad) == sorted([f"{x}", "is", "odd"] for x in range(1, 50, 2))
    assert {str(one).split()[1]: one.__notes__ for one in bad} == {
        f"{x}": [f"(item {x} of map())"] for x in range(1, 50, 2)
    }
    if ordered:
        assert values[::2] == good


@pytest.mark.anyio
@both
async def test_error_that_is_raised_says_which_item_it_is_of(serving: Serving, mapped: Mapped) -> None:
    with pytest.raises(ValueError, match="7 is odd") as caught:
        await mapped(serving(Model).fail_on_odd, [0, 2, 4, 7, 8])
    assert caught.value.__notes__ == ["(item 3 of map())"]


@pytest.mark.anyio
@pytest.mark.parametrize("ordered", [True, False])
@both
async def test_item_that_cannot_be_pickled_is_an_error_in_its_place_that_names_it(
    serving: Serving, mapped: Mapped, ordered: bool
) -> None:
    handle = serving(Model)
    items = [0, 1, (x for x in "a"), 3]

    values = await mapped(handle, items, ordered=ordered, return_exceptions=True)
    with pytest.raises(SerializationError, match=r"^item 2: the arguments of app.Model"):
        await mapped(handle, items, ordered=ordered)

    (error,) = [value for value in values if isinstance(value, SerializationError)]
    assert vars(error)["item"] == 2 and "generator" in str(error)
    assert [value for value in values if value is not error] == [0, 1, 3]
    assert not ordered or values[2] is error


@pytest.mark.anyio
@both
async def test_item_that_is_too_large_is_an_error_in_its_place_that_names_it(
    serving: Serving, mapped: Mapped, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = serving(Model)
    monkeypatch.setattr(pickling, "limit_bytes", lambda: 100_000)

    (first, error) = await mapped(handle, ["x", "x" * 200_000], return_exceptions=True)

    assert first == "x"
    assert isinstance(error, PayloadTooLargeError) and str(error).startswith("item 1: ")


@pytest.mark.anyio
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("return_exceptions", [True, False])
@both
async def test_error_of_the_items_is_raised_after_what_came_before_it(
    serving: Serving, mapped: Mapped, ordered: bool, return_exceptions: bool
) -> None:
    def items() -> Iterator[int]:
        yield from range(10)
        raise OSError("the file is gone")

    seen: list[Any] = []

    async def watch(handle: DeploymentHandle) -> None:
        if mapped is on_the_loop:
            await collect(handle.map(items(), ordered=ordered, return_exceptions=return_exceptions), seen)
        else:
            sync = SyncHandle("Model", "app")
            how = {"ordered": ordered, "return_exceptions": return_exceptions}
            await asyncio.to_thread(lambda: seen.extend(sync.map(items(), **how)))

    with pytest.raises(OSError, match="the file is gone"):
        await watch(serving(Model))
    assert sorted(seen) == list(range(10))


@pytest.mark.anyio
@pytest.mark.parametrize("ordered", [True, False])
@both
async def test_each_item_of_an_unknown_deployment_has_an_error_of_its_own(
    serving: Serving, mapped: Mapped, ordered: bool
) -> None:
    errors = await mapped(DeploymentHandle("Nobody", "app"), range(20), ordered=ordered, return_exceptions=True)

    assert all(isinstance(error, DeploymentNotFoundError) for error in errors)
    assert sorted(error.__notes__ for error in errors) == sorted([f"(item {x} of map())"] for x in range(20))


# lazy, and without an end


@pytest.mark.anyio
@pytest.mark.parametrize("ordered", [True, False])
async def test_items_without_an_end_are_taken_as_values_are_asked_for(serving: Serving, ordered: bool) -> None:
    handle = serving(Model)
    numbers = itertools.count()
    values = []

    async for value in handle.map(numbers, max_in_flight=8, ordered=ordered):
        values.append(value)
        if len(values) == 300:
            break

    assert next(numbers) == 307  # eight in flight when a value is asked for: 300 of them were given out
    assert len(set(values)) == 300
    if ordered:
        assert values == list(range(300))


@pytest.mark.parametrize("ordered", [True, False])
def test_items_without_an_end_for_blocking_callers(serving: Serving, ordered: bool) -> None:
    numbers = itertools.count()
    mapping = serving.sync(Model).map(numbers, max_in_flight=8, ordered=ordered)

    values = list(itertools.islice(mapping, 300))

    assert next(numbers) == 307
    assert sorted(values)[:292] == list(range(292))


@pytest.mark.anyio
async def test_slow_consumer_has_no_more_sent_than_is_in_flight(serving: Serving) -> None:
    handle, items = serving(Model), Counted(1000)
    mapping = handle.map(items, max_in_flight=5)

    assert items.taken == 0
    assert await anext(mapping) == 0
    await asyncio.sleep(0.05)

    assert items.taken == 5 and await handle.count.call() == 5
    assert await anext(mapping) == 1
    assert items.taken == 6


# leaving early


@pytest.mark.anyio
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("how", ["break", "aclose", "error", "drop"])
async def test_what_is_in_flight_at_an_early_exit_goes_on_and_says_nothing(
    serving: Serving, ordered: bool, how: str
) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    engine = engines.current()
    gate = Gate()

    async def work(x: int) -> int:
        if x == 0:
            return x
        await gate.wait()
        raise ValueError(f"{x}")  # nobody asks any more

    closed: list[bool] = []

    async def items() -> AsyncIterator[int]:
        try:
            for x in itertools.count():
                yield x
        finally:
            closed.append(True)

    source: Any = items()
    mapping: Any = serving(work).map(source, max_in_flight=10, ordered=ordered)
    assert await anext(mapping) == 0
    await wait_until(lambda: gate.inside == 9)
    if how == "aclose":
        await mapping.aclose()
    elif how == "break":
        next_value = asyncio.ensure_future(anext(mapping))
        await asyncio.sleep(0)
        next_value.cancel()
        await asyncio.wait([next_value])
    elif how == "error":
        with pytest.raises(RuntimeError):
            await mapping.athrow(RuntimeError("in the body of the loop"))
    del mapping
    gc.collect()

    gate.open()
    await wait_until(lambda: not engine.pending)
    assert gate.passed in (9, 10)
    await source.aclose()
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == [] and closed == [True]


@pytest.mark.parametrize("ordered", [True, False])
def test_what_is_in_flight_at_an_early_exit_goes_on_for_blocking_callers(serving: Serving, ordered: bool) -> None:
    gate = Gate()

    async def work(x: int) -> int:
        if x:
            await gate.wait()
        return x

    for value in serving.sync(work).map(itertools.count(), max_in_flight=10, ordered=ordered):
        assert value == 0
        break

    gate.open()
    asyncio.run(wait_until(lambda: gate.passed == 9 and not engines.background().engine.pending))


# options and other methods


@pytest.mark.anyio
@both
async def test_options_go_with_every_item(serving: Serving, mapped: Mapped) -> None:
    gate = Gate()
    handle = serving(Model, gate)

    errors = await mapped(handle.held.options(timeout_s=0.1, priority="high"), range(5), return_exceptions=True)

    assert [type(error) for error in errors] == [RequestTimeoutError] * 5
    gate.open()


@pytest.mark.anyio
@both
async def test_map_that_waits_for_room_sends_everything_through_a_short_queue(serving: Serving, mapped: Mapped) -> None:
    handle = serving(Model, max_queued_requests=3, max_ongoing_requests=2)

    values = await mapped(handle.options(when_full="wait"), range(200), max_in_flight=100)

    assert values == list(range(200))


@pytest.mark.anyio
@both
async def test_idempotency_key_is_completed_by_the_number_of_the_item(serving: Serving, mapped: Mapped) -> None:
    handle = serving(Model)
    keyed = handle.options(idempotency_key="nightly")

    first = await mapped(keyed, range(20))
    again = await mapped(keyed, range(20))
    other = await mapped(handle.options(idempotency_key="next night"), range(3))

    assert first == again == list(range(20)) and other == [0, 1, 2]
    assert await handle.count.call() == 23, "the second time nothing ran"


@pytest.mark.anyio
async def test_starmap_spreads_the_arguments_of_each_call(serving: Serving) -> None:
    handle = serving(Model)
    sync = SyncHandle("Model", "app")

    assert await collect(handle.add.starmap([(1, 2), [3], (4, 5)])) == [3, 103, 9]
    assert await asyncio.to_thread(lambda: list(sync.add.starmap(zip([1, 2], [3, 4], strict=True)))) == [4, 6]
    wrong: Any = [(1, 2), 3]
    with pytest.raises(TypeError):
        await collect(handle.add.starmap(wrong))
    with pytest.raises(TypeError):
        await asyncio.to_thread(lambda: list(sync.add.starmap(wrong)))


@pytest.mark.anyio
async def test_refs_and_tasks_are_items_like_any_other(serving: Serving) -> None:
    handle = serving(Model)
    refs = [await handle.remote(x) for x in range(3)]

    assert await collect(handle.map([*refs, handle.remote(3)])) == [0, 1, 2, 3]


# what cannot be mapped over


def test_blocking_map_refuses_asynchronous_items_at_once() -> None:
    for name in ("map", "starmap"):
        with pytest.raises(TypeError, match=r"async_generator needs `async for`; use a DeploymentHandle"):
            getattr(SyncHandle("Model"), name)(Counted(3).aiter())


@pytest.mark.parametrize("handle", [DeploymentHandle("Model"), SyncHandle("Model")])
@pytest.mark.parametrize("items", [3, None])
def test_what_cannot_be_iterated_is_refused_at_once(handle: Any, items: Any) -> None:
    with pytest.raises(TypeError, match="is not iterable"):
        handle.map(items)


# the bar


def test_bar_counts_errors_too_and_is_gone_after_an_early_exit(
    serving: Serving, capsys: pytest.CaptureFixture[str]
) -> None:
    handle = serving.sync(Model)

    assert len(list(handle.fail_on_odd.map(range(4), progress=True, return_exceptions=True))) == 4
    assert "4/4" in capsys.readouterr().out
    mapping: Any = handle.map(range(10), progress=True)
    next(mapping)
    mapping.close()
    assert list(handle.map(range(2), progress=True)) == [0, 1]
    assert "2/2" in capsys.readouterr().out
