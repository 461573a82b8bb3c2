"""`map_refs`: one request per item, sent together, and their refs once the server has them all."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from millstream.broker.connection import Control
from millstream.broker.keys import Keys
from millstream.errors import BackPressureError, DeploymentNotFoundError, SerializationError
from millstream.handles import engines, map_refs
from millstream.handles.handle import DeploymentHandle, SyncHandle
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Serving


class Model:
    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate or Gate()

    async def __call__(self, x: Any) -> Any:
        return 2 * x

    async def held(self, x: int) -> int:
        await self._gate.wait()
        return x

    async def add(self, x: int, y: int = 0) -> int:
        return x + y


@pytest.mark.anyio
async def test_refs_come_in_the_order_of_the_items_and_the_server_has_them(serving: Serving, redis: Control) -> None:
    gate = Gate()
    handle = serving(Model, gate).held

    refs = await handle.map_refs(range(300))

    assert not any(ref.done() for ref in refs)
    assert await redis.hlen(Keys(engines.settings().namespace).deployment("app.Model").open) == 300
    gate.open()
    assert [await ref for ref in refs] == list(range(300))


def test_refs_for_blocking_callers(serving: Serving) -> None:
    handle = serving.sync(Model)

    refs = handle.map_refs(x for x in range(300))

    assert [ref.result(10) for ref in refs] == [2 * x for x in range(300)]
    assert handle.map_refs([]) == []


@pytest.mark.anyio
async def test_items_may_be_awaited_large_refs_or_have_keys(serving: Serving) -> None:
    handle = serving(Model)

    async def items() -> AsyncIterator[Any]:
        yield 1
        yield handle.remote(2)
        yield b"x" * 100_000

    assert [await ref for ref in await handle.map_refs(items())] == [2, 8, b"x" * 200_000]
    keyed = handle.options(idempotency_key="k")
    once, again = await keyed.map_refs([1, 2]), await keyed.map_refs([3, 4])
    assert once == again
    assert [await ref for ref in again] == [2, 4]


@pytest.mark.anyio
async def test_more_than_may_be_on_their_way_at_a_time(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_refs, "UNCONFIRMED", 70)
    handle = serving(Model)

    refs = await handle.map_refs(range(1000))

    assert await asyncio.gather(*refs) == [2 * x for x in range(1000)]


@pytest.mark.anyio
async def test_item_that_cannot_be_sent_is_named_and_those_before_it_run(serving: Serving) -> None:
    ran: list[int] = []

    async def note(x: Any) -> None:
        ran.append(x)

    handle = serving(note)
    with pytest.raises(SerializationError, match=r"^item 2: the arguments of") as caught:
        await handle.map_refs([0, 1, (x for x in "a"), 3])

    assert caught.value.__notes__ == ["(item 2 of map_refs(); those before it are with the server)"]
    await wait_until(lambda: {0, 1} <= set(ran))


@pytest.mark.anyio
async def test_error_of_the_items_themselves_is_raised(serving: Serving) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        await serving(Model).map_refs(items())


def test_items_that_have_to_be_awaited_are_refused_by_blocking_handles() -> None:
    async def items() -> AsyncIterator[int]:
        yield 1

    awaited: Any = items()
    with pytest.raises(TypeError, match="needs `async for`"):
        SyncHandle("Model", "app").map_refs(awaited)


@pytest.mark.anyio
async def test_what_the_server_refuses_is_raised(serving: Serving) -> None:
    gate = Gate()
    full = serving(Model, gate, max_ongoing_requests=1, max_queued_requests=5).held

    with pytest.raises(BackPressureError, match="max_queued_requests"):
        await full.map_refs(range(100))
    gate.open()
    with pytest.raises(DeploymentNotFoundError):
        await DeploymentHandle("Nobody", "app").map_refs([1])
