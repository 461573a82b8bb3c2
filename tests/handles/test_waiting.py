"""`get`, `wait` and `put`: Ray's rules, and what blocking means on a running loop."""

import asyncio
import re
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import anyio.to_thread
import pytest

import millstream
from millstream.broker import pickling
from millstream.config import Settings
from millstream.errors import GetTimeoutError, PayloadTooLargeError, RefNotFoundError, SerializationError
from millstream.handles import engines
from millstream.handles.handle import DeploymentHandle, SyncHandle
from millstream.handles.ref import ObjectRef
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Serving
from tests.timing import timed

UNKNOWN = "app.Model~" + "u" * 22


class Model:
    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate or Gate()

    async def held(self, x: Any = None) -> Any:
        await self._gate.wait()
        return x

    async def __call__(self, x: Any = None) -> Any:
        return x

    async def fail(self, text: str) -> None:
        raise ValueError(text)


# get


def test_get_of_a_ref_is_its_value_and_of_a_list_a_list_in_its_order(serving: Serving) -> None:
    handle = serving.sync(Model)
    refs = [handle.remote(x) for x in range(5)]

    assert millstream.get(refs[3]) == 3
    assert millstream.get(refs[::-1]) == [4, 3, 2, 1, 0]
    assert millstream.get([refs[0], refs[0]]) == [0, 0]
    assert millstream.get([]) == []


def test_get_raises_the_first_failure_in_the_order_of_the_list(serving: Serving) -> None:
    handle = serving.sync(Model)
    refs = [handle.remote(1), handle.fail.remote("first"), handle.fail.remote("second")]
    millstream.wait(refs, num_returns=3)

    with pytest.raises(ValueError, match="first"):
        millstream.get(refs)
    with pytest.raises(ValueError, match="second"):
        millstream.get(refs[::-1])


def test_get_raises_a_failure_without_waiting_for_what_comes_after_it(serving: Serving) -> None:
    gate = Gate()
    handle = serving.sync(Model, gate)

    with pytest.raises(ValueError, match="first"):
        millstream.get([handle.fail.remote("first"), handle.held.remote()], timeout=5)
    gate.open()


@timed
def test_get_gives_up_after_its_timeout_for_all_and_says_what_is_missing(serving: Serving) -> None:
    gate = Gate()
    handle = serving.sync(Model, gate)
    refs = [handle.remote(0), handle.held.remote(1), handle.held.remote(2)]

    start = time.monotonic()
    with pytest.raises(GetTimeoutError, match=r"2 of 3 requests have no result after 0.1 s") as caught:
        millstream.get(refs, timeout=0.1)
    gate.open()

    assert time.monotonic() - start < 1
    assert caught.value.ref_id == refs[1].id
    assert millstream.get(refs, timeout=5) == [0, 1, 2]


def test_get_with_timeout_zero_polls(serving: Serving) -> None:
    gate = Gate()
    handle = serving.sync(Model, gate)
    ref = handle.held.remote(1)

    with pytest.raises(GetTimeoutError):
        millstream.get(ref, timeout=0)
    with pytest.raises(GetTimeoutError):
        millstream.get([ref], timeout=0)
    gate.open()
    ref.result(5)

    assert millstream.get([ref], timeout=0) == [1]


@pytest.mark.parametrize("what", [(), "x", None, {}, [1], [ObjectRef.from_id(UNKNOWN), "x"], {1: 2}])
def test_get_of_anything_else_is_refused(what: Any) -> None:
    with pytest.raises(ValueError, match="takes a ref or a list of refs"):
        millstream.get(what)


# wait


def test_wait_returns_what_is_ready_and_what_is_not_in_the_order_of_the_list(serving: Serving) -> None:
    gate = Gate()
    handle = serving.sync(Model, gate)
    slow, first, second = handle.held.remote(0), handle.remote(1), handle.remote(2)
    millstream.get([first, second])

    assert millstream.wait([slow, second, first], num_returns=2) == ([second, first], [slow])
    gate.open()
    assert millstream.wait([slow, second, first], num_returns=3) == ([slow, second, first], [])


def test_wait_returns_no_more_than_asked_for(serving: Serving) -> None:
    handle = serving.sync(Model)
    refs = [handle.remote(x) for x in range(4)]
    millstream.get(refs)

    assert millstream.wait(refs) == (refs[:1], refs[1:])
    assert millstream.wait(refs, num_returns=3, fetch_local=False) == (refs[:3], refs[3:])


def test_wait_counts_a_failure_as_ready(serving: Serving) -> None:
    gate = Gate()
    handle = serving.sync(Model, gate)
    slow, failed = handle.held.remote(), handle.fail.remote("x")

    assert millstream.wait([slow, failed]) == ([failed], [slow])
    assert millstream.wait([slow, ObjectRef.from_id(UNKNOWN)])[1] == [slow]
    gate.open()


@timed
def test_wait_returns_fewer_when_its_time_is_up(serving: Serving) -> None:
    gate = Gate()
    handle = serving.sync(Model, gate)
    slow, quick = handle.held.remote(), handle.remote()
    quick.result()

    start = time.monotonic()
    assert millstream.wait([slow, quick], num_returns=2, timeout=0.1) == ([quick], [slow])
    assert 0.1 <= time.monotonic() - start < 1
    assert millstream.wait([slow, quick], num_returns=2, timeout=0) == ([quick], [slow])
    gate.open()


def test_wait_returns_as_soon_as_enough_are_ready(serving: Serving) -> None:
    gate = Gate()
    refs = [serving.sync(Model, gate).held.remote(x) for x in range(3)]
    serving.run(_open_later(gate))

    assert millstream.wait(refs, num_returns=3, timeout=5) == (refs, [])


async def _open_later(gate: Gate) -> None:
    asyncio.get_running_loop().call_later(0.05, gate.open)


def test_wait_for_nothing_returns_nothing() -> None:
    assert millstream.wait([]) == ([], [])


@pytest.mark.parametrize("what", [ObjectRef.from_id(UNKNOWN), (ObjectRef.from_id(UNKNOWN),), "x", None, [1]])
def test_wait_takes_a_list_of_refs_only(what: Any) -> None:
    with pytest.raises(TypeError, match="takes a list of refs"):
        millstream.wait(what)


@pytest.mark.parametrize(
    ("count", "options", "complaint"),
    [
        (2, {"num_returns": 0}, "num_returns=0"),
        (2, {"num_returns": -1}, "num_returns=-1"),
        (2, {"num_returns": 3}, "num_returns=3 must be 1 to the number of refs, 2"),
        (2, {"timeout": -0.1}, "timeout=-0.1 must not be negative"),
    ],
)
def test_wait_refuses_what_makes_no_sense(count: int, options: dict[str, Any], complaint: str) -> None:
    refs = [ObjectRef.from_id(f"app.Model~{n:022d}") for n in range(count)]

    with pytest.raises(ValueError, match=re.escape(complaint)):
        millstream.wait(refs, **options)


@pytest.mark.parametrize("number", [1.0, "1", None])
def test_wait_takes_a_whole_number_only(number: Any) -> None:
    with pytest.raises(TypeError, match="must be a whole number"):
        millstream.wait([ObjectRef.from_id(UNKNOWN)], num_returns=number)


def test_wait_refuses_duplicates() -> None:
    with pytest.raises(ValueError, match="holds one twice"):
        millstream.wait([ObjectRef.from_id(UNKNOWN), ObjectRef.from_id(UNKNOWN)])


# put


def test_value_that_cannot_be_put_is_named(connected: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SerializationError, match=re.escape("the value put['x'] cannot be pickled")):
        millstream.put({"x": (number for number in range(1))})
    monkeypatch.setattr(pickling, "limit_bytes", lambda: 100_000)
    with pytest.raises(PayloadTooLargeError, match="the limit is 100,000"):
        millstream.put(b"x" * 100_001)


def test_refs_of_values_that_were_put_are_all_different(connected: Settings) -> None:
    refs = [millstream.put(x) for x in range(20)]

    assert len(set(refs)) == 20
    assert millstream.get(refs) == list(range(20))


# blocking a running loop

Blocking = Callable[[SyncHandle, DeploymentHandle], Awaitable[Any]]


async def blocking_call(sync: SyncHandle, _: DeploymentHandle) -> Any:
    return sync.call(1)


async def blocking_remote(sync: SyncHandle, _: DeploymentHandle) -> Any:
    return await sync.remote(1)


async def blocking_get(_: SyncHandle, handle: DeploymentHandle) -> Any:
    return millstream.get(await handle.remote(1))


async def blocking_get_of_a_list(_: SyncHandle, handle: DeploymentHandle) -> Any:
    return millstream.get([await handle.remote(1)])[0]


async def blocking_wait(_: SyncHandle, handle: DeploymentHandle) -> Any:
    (ref,), _rest = millstream.wait([await handle.remote(1)])
    return await ref


async def blocking_result(_: SyncHandle, handle: DeploymentHandle) -> Any:
    return (await handle.remote(1)).result()


async def blocking_result_of_a_ref_by_id(_: SyncHandle, handle: DeploymentHandle) -> Any:
    return ObjectRef.from_id((await handle.remote(1)).id).result()


@pytest.fixture
def nothing_was_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_warned", set())


@pytest.fixture
def warned() -> Iterator[list[warnings.WarningMessage]]:
    """The warnings of a test; they are no errors there."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


@pytest.mark.anyio
@pytest.mark.usefixtures("nothing_was_said_yet")
@pytest.mark.parametrize(
    "blocking", [blocking_call, blocking_remote, blocking_get_of_a_list, blocking_result_of_a_ref_by_id]
)
async def test_blocking_on_a_running_loop_warns_once_where_it_is_and_names_the_other_way(
    serving: Serving, blocking: Blocking, warned: list[warnings.WarningMessage]
) -> None:
    handle = serving(Model)
    sync = SyncHandle("Model", "app")

    values = [await blocking(sync, handle) for _ in range(3)]

    assert values == [1, 1, 1]
    (warning,) = warned
    assert warning.category is RuntimeWarning and "blocks the running event loop" in str(warning.message)
    assert "await" in str(warning.message)


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:.*blocks the running event loop")
@pytest.mark.parametrize("anyio_backend", ["asyncio", ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("blocking", [blocking_get, blocking_wait, blocking_result])
async def test_blocking_on_a_running_loop_finishes(serving: Serving, blocking: Blocking) -> None:
    handle = serving(Model)

    assert await blocking(SyncHandle("Model", "app"), handle) == 1


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:.*blocks the running event loop")
@pytest.mark.parametrize("anyio_backend", ["asyncio", ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("is_connected", [False, True])
async def test_blocking_on_what_the_loop_has_not_sent_yet_finishes(serving: Serving, is_connected: bool) -> None:
    handle = serving(Model)
    if is_connected:
        await handle.call()

    tasks = [handle.remote(x) for x in range(200)]

    assert millstream.get([task.ref for task in tasks], timeout=5) == list(range(200))
    assert await asyncio.gather(*[await task for task in tasks]) == list(range(200))


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:.*blocks the running event loop")
@pytest.mark.parametrize("is_connected", [False, True])
async def test_blocking_on_a_request_that_the_loop_has_not_parked_yet_finishes(
    serving: Serving, is_connected: bool
) -> None:
    handle = serving(Model)
    if is_connected:
        await handle.call()

    first = handle.remote(1)
    second = handle.remote(first)
    third = handle.options(delay_s=0.01).remote(second)

    assert third.ref.result(5) == 1
    assert [await (await task) for task in (first, second, third)] == [1, 1, 1]


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:.*blocks the running event loop")
async def test_blocking_inside_a_replica_finishes(serving: Serving) -> None:
    inner = serving(Model)

    class Outer:
        async def __call__(self, x: int) -> Any:
            await asyncio.sleep(0)
            return millstream.get(await inner.remote(x)) + millstream.get(inner.remote(x).ref)

    elsewhere = Serving(engines.settings())  # or the blocked loop would be the one that `inner` lives on
    try:
        elsewhere._apps = 1
        assert await elsewhere(Outer).call(4) == 8
    finally:
        await anyio.to_thread.run_sync(elsewhere.close)


@pytest.mark.anyio
async def test_blocking_in_a_thread_warns_nobody(serving: Serving) -> None:
    gate = Gate()
    ref = await serving(Model, gate).held.remote(1)
    values = asyncio.create_task(anyio.to_thread.run_sync(millstream.get, [ref]))
    await wait_until(lambda: gate.inside == 1)

    gate.open()

    assert await values == [1]


def test_unknown_ref_is_an_error_of_get(connected: Settings) -> None:
    with pytest.raises(RefNotFoundError):
        millstream.get(ObjectRef.from_id(UNKNOWN), timeout=5)
