"""Cancelling what runs: what it has sent is cancelled, too; replicas obey, find out by themselves, or are replaced."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from millstream import serve
from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys
from millstream.config import Settings
from millstream.handles.handle import DeploymentHandle, SyncHandle
from millstream.replicas import orders
from tests.handles.held import Model, Notes
from tests.helpers import wait_until
from tests.replica_helpers import Serving, Stage, connections, cut

pytestmark = pytest.mark.anyio


# orders


async def test_replica_that_missed_the_order_finds_out_by_itself(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, notes: Notes
) -> None:
    handle = serving(Model, notes)
    refs = [await handle.remote(x) for x in range(3)]
    monkeypatch.setattr(serving._hosted[0].replica._orders, "_take_away", lambda *_, **__: None)
    assert await refs[1].acancel()
    monkeypatch.undo()

    await wait_until(lambda: notes.cancelled == [1], 5)
    notes.gate.open()

    assert [await refs[0], await refs[2]] == [0, 2]


async def test_cancel_that_comes_while_the_replicas_connections_are_lost_is_obeyed_later(
    serving: Serving, redis: Control, notes: Notes
) -> None:
    ref = await serving(Model, notes).remote(1)

    await cut(redis, "ms:hears:", "ms:writes:", "ms:reads:")
    assert await ref.acancel()

    await wait_until(lambda: notes.cancelled == [1], 5)


async def test_message_that_is_no_order_is_ignored(serving: Serving, redis: Any) -> None:
    handle = serving(Model)
    name = serving._hosted[0].name
    before = await connections(redis, "ms:hears:")

    for message in (b"", b"cancel", b"cancel normal", b"read normal 1-1 many", b"\xff\xfe x y", b"dance normal 1-1"):
        await redis.execute_command("SPUBLISH", DeploymentKeys("ms", "app.Model").orders(name), message)

    assert await handle.echo.call(1) == 1
    assert await connections(redis, "ms:hears:") == before


# replicas that are replaced


@pytest.mark.parametrize("method", ["deaf", "stubborn"])
async def test_replica_that_stays_busy_is_replaced_where_the_caller_wants_it(
    stage: Stage, redis: Control, monkeypatch: pytest.MonkeyPatch, method: str, notes: Notes
) -> None:
    monkeypatch.setattr(orders, "CLEAN_UP_S", 0.1)
    hosted = await stage.start(Model, notes, max_ongoing_requests=5)
    stuck = await stage.handle.options(method_name=method, kill_on_cancel=True).remote("stuck")
    beside = await stage.handle.remote("beside")

    await stuck.acancel()

    assert "kill_on_cancel" in (await hosted.hears("recycling"))["recycling"]
    notes.gate.open()
    assert await asyncio.wait_for(beside, 5) == "beside"
    assert await hosted.end() == 0


async def test_replica_that_obeys_is_not_replaced(stage: Stage, monkeypatch: pytest.MonkeyPatch, notes: Notes) -> None:
    monkeypatch.setattr(orders, "CLEAN_UP_S", 0.05)
    hosted = await stage.start(Model, notes)
    ref = await stage.handle.options(kill_on_cancel=True).remote(1)

    await ref.acancel()
    await wait_until(lambda: notes.cancelled == [1])
    await asyncio.sleep(0.1)

    assert not any("recycling" in message for message in hosted.heard)


async def test_replica_is_not_replaced_for_others(stage: Stage, notes: Notes) -> None:
    hosted = await stage.start(Model, notes)
    ref = await stage.handle.deaf.remote(1)

    await ref.acancel()
    await stage.handle.options(method_name="echo").call(2)

    assert not any("recycling" in message for message in hosted.heard)
    notes.gate.open()


@pytest.fixture
async def stage(connected: Settings) -> AsyncIterator[Stage]:
    async with _stage(connected) as stage:
        yield stage


@asynccontextmanager
async def _stage(settings: Settings) -> AsyncIterator[Stage]:
    stage = Stage(settings)
    yield stage
    await stage.drain()


# what it has sent


class Parent:
    """Sends requests to `child` in every way, and waits for them."""

    def __init__(self, child: DeploymentHandle) -> None:
        self._child = child
        self._blocking = SyncHandle(child.deployment_name, child.app_name)

    async def by_remote(self) -> Any:
        return await (await self._child.remote("a"))

    async def by_call(self) -> Any:
        return await self._child.call("a")

    async def by_many(self) -> Any:
        return [value async for value in self._child.map(["a", "b", "c"])]

    async def without_waiting(self) -> Any:
        self._child.remote("a")
        await asyncio.sleep(60)

    async def after_a_wait_in_vain(self) -> Any:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(self._child.call("a"), 0.05)
        await asyncio.sleep(60)

    async def parked(self) -> Any:
        return await self._child.take.call(self._child.remote("a"))

    async def with_a_key(self) -> Any:
        return await self._child.options(idempotency_key="k").call("a")

    async def in_a_thread(self) -> Any:
        return await asyncio.to_thread(self._blocking.call, "a")

    def blocking_call(self) -> Any:
        return self._blocking.call("a")

    def blocking_ref(self) -> Any:
        return self._blocking.remote("a").result()

    def blocking_parked(self) -> Any:
        return self._blocking.take.call(self._blocking.remote("a"))

    def blocking_many(self) -> Any:
        return list(self._blocking.map(["a", "b", "c"]))

    async def echo(self, x: Any) -> Any:
        return x


WAYS = [
    "by_remote", "by_call", "by_many", "without_waiting", "after_a_wait_in_vain", "parked", "in_a_thread",
    "blocking_call", "blocking_ref", "blocking_parked", "blocking_many",
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
async def test_requests_that_a_request_has_sent_are_cancelled_with_it(
    serving: Serving, redis: Control, keys: DeploymentKeys, way: str, notes: Notes
) -> None:
    parent = serving(Parent, serving(Model, notes)).options(method_name=way)
    ref = await parent.remote()
    count = 3 if "many" in way else 1
    await wait_until(lambda: len(notes.started) == count)
    if way == "after_a_wait_in_vain":
        await asyncio.sleep(0.1)

    assert await ref.acancel()

    await wait_until(lambda: len(notes.cancelled) == count)
    assert "take" not in notes.started
    await wait_until(lambda: _is_empty(redis, keys.open))
    assert await asyncio.wait_for(parent.options(method_name="echo").call(1), 5) == 1  # its slot or thread is free


async def _is_empty(redis: Control, key: str) -> bool:
    return not await redis.exists(key)


async def test_requests_several_levels_down_are_cancelled(serving: Serving, notes: Notes) -> None:
    class Middle:
        def __init__(self, below: DeploymentHandle) -> None:
            self._below = below

        async def __call__(self) -> Any:
            return await self._below.call()

    class ByThread:
        def __init__(self, below: DeploymentHandle) -> None:
            self._below = SyncHandle(below.deployment_name, below.app_name)

        def __call__(self) -> Any:
            return self._below.call()

    handle = serving(Parent, serving(Model, notes)).options(method_name="by_call")
    for cls in (Middle, ByThread, Middle, ByThread):
        handle = serving(cls, handle)
    ref = await handle.remote()
    await wait_until(lambda: notes.started == ["a"])

    await ref.acancel()

    await wait_until(lambda: notes.cancelled == ["a"])


async def test_request_with_a_key_may_be_somebody_elses_and_goes_on(serving: Serving, notes: Notes) -> None:
    handle = serving(Parent, serving(Model, notes))
    ref = await handle.with_a_key.remote()
    await wait_until(lambda: notes.started == ["a"])
    other = await handle.with_a_key.remote()

    await ref.acancel()
    await asyncio.sleep(0.1)
    notes.gate.open()

    assert await asyncio.wait_for(other, 5) == "a"


async def test_what_is_sent_while_cleaning_up_is_not_cancelled(serving: Serving) -> None:
    class CleansUp:
        def __init__(self, child: DeploymentHandle) -> None:
            self._child = child
            self.said = ""

        async def __call__(self) -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.said = await self._child.echo.call("cleaned up")
                raise

        async def what(self) -> str:
            return self.said

    handle = serving(CleansUp, serving(Model))
    ref = await handle.remote()

    await ref.acancel()

    await wait_until(lambda: _equals(handle.what.call(), "cleaned up"))


async def _equals(value: Any, expected: Any) -> bool:
    return bool(await value == expected)


async def test_many_requests_that_have_ended_are_forgotten(serving: Serving) -> None:
    class Busy:
        def __init__(self, child: DeploymentHandle) -> None:
            self._child = child

        async def __call__(self) -> int:
            for x in range(500):
                await self._child.echo.call(x)
            return len(serve.get_request_context()._children or ())

    assert await serving(Busy, serving(Model)).call() < 150


# what code may know


async def test_code_knows_the_id_of_its_request(serving: Serving) -> None:
    ref = await serving(Model).whoami.remote()

    assert await ref == ref.id


def test_outside_of_a_request_there_is_no_context() -> None:
    with pytest.raises(RuntimeError, match="no request runs here"):
        serve.get_request_context()


async def test_several_threads_of_a_request_may_wait_for_its_end(serving: Serving) -> None:
    class Threads:
        async def __call__(self) -> None:
            request = serve.get_request_context()
            threads = [threading.Thread(target=lambda: woken.append(request.wait_cancelled(10))) for _ in range(20)]
            for thread in threads:
                thread.start()
            await asyncio.sleep(60)

    woken: list[bool] = []
    ref = await serving(Threads).remote()

    await ref.acancel()

    await wait_until(lambda: woken == [True] * 20)
