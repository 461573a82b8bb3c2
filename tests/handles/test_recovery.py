"""A server that comes back without the last seconds of its data: what it had acknowledged is sent again by its callers."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from millstream.errors import RefNotFoundError
from millstream.handles import engines, patrol
from millstream.handles.handle import DeploymentHandle
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Serving
from tests.servers import Server

pytestmark = pytest.mark.anyio


class Model:
    """Runs through a gate, and counts its runs."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.runs: Counter[Any] = Counter()

    async def __call__(self, x: Any) -> Any:
        self.runs[x] += 1
        await self._gate.wait()
        return x

    async def counted(self) -> Counter[Any]:
        return self.runs


class OneIsSlow(Model):
    """Only one value goes through the gate."""

    def __init__(self, gate: Gate, slow: int) -> None:
        super().__init__(gate)
        self._slow = slow

    async def __call__(self, x: Any) -> Any:
        if x == self._slow:
            return await super().__call__(x)
        self.runs[x] += 1
        return x


class Disk:
    """What the server had written at one moment; `lose_the_rest` while it is down makes that all there is."""

    def __init__(self, server: Server) -> None:
        (self._file,) = server.folder.glob("appendonlydir/*.incr.aof")
        self._size = self._file.stat().st_size

    def lose_the_rest(self) -> None:
        with self._file.open("r+b") as file:
            file.truncate(self._size)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is looked up soon."""
    monkeypatch.setattr(patrol, "LOOK_AFTER_S", 0.1)


def restart_without(server: Server, disk: Disk) -> None:
    server.kill()
    disk.lose_the_rest()
    server.start()


async def test_requests_that_their_server_has_lost_are_sent_again_under_the_same_ids(
    own_server: Server, serving_there: Serving
) -> None:
    gate = Gate()
    handle: DeploymentHandle[Any] = serving_there(Model, gate)
    disk = Disk(own_server)
    refs = [await handle.remote(x) for x in range(5)]
    ids = [ref.id for ref in refs]

    await asyncio.to_thread(restart_without, own_server, disk)
    gate.open()

    assert await asyncio.wait_for(asyncio.gather(*refs), 20) == list(range(5))
    assert [ref.id for ref in refs] == ids
    assert await handle.counted.call() == dict.fromkeys(range(5), 2)


@pytest.mark.parametrize("slow", [0, 4])
async def test_of_requests_sent_together_those_that_have_not_ended_are_sent_again(
    own_server: Server, serving_there: Serving, slow: int
) -> None:
    gate = Gate()
    handle: DeploymentHandle[Any] = serving_there(OneIsSlow, gate, slow)
    disk = Disk(own_server)
    refs = [task.ref for task in [handle.remote(x) for x in range(5)]]
    quick = [await ref for x, ref in enumerate(refs) if x != slow]
    engines.current().recovery.prune()  # as at every tick: it forgets what has ended

    await asyncio.to_thread(restart_without, own_server, disk)
    gate.open()

    assert await asyncio.wait_for(refs[slow], 20) == slow
    assert quick == [x for x in range(5) if x != slow]
    assert await handle.counted.call() == {x: 2 if x == slow else 1 for x in range(5)}


async def test_chain_that_its_server_has_lost_is_sent_again(own_server: Server, serving_there: Serving) -> None:
    gate = Gate()
    handle: DeploymentHandle[Any] = serving_there(Model, gate)
    disk = Disk(own_server)
    first = handle.options(block_until="queued").remote("first")
    second = await handle.options(block_until="queued").remote(first)
    delayed = await handle.options(delay_s=0.3).remote("delayed")

    await asyncio.to_thread(restart_without, own_server, disk)
    gate.open()

    assert list(await asyncio.wait_for(asyncio.gather(second, delayed), 20)) == ["first", "delayed"]


async def test_keyed_request_that_its_server_has_lost_is_one_request_again(
    own_server: Server, serving_there: Serving
) -> None:
    gate = Gate()
    handle: DeploymentHandle[Any] = serving_there(Model, gate)
    disk = Disk(own_server)
    calls = [handle.options(idempotency_key="k").call("x") for _ in range(3)]
    await wait_until(lambda: gate.inside == 1)

    await asyncio.to_thread(restart_without, own_server, disk)
    gate.open()

    assert await asyncio.wait_for(asyncio.gather(*calls), 20) == ["x"] * 3
    assert await handle.counted.call() == {"x": 2}


async def test_what_may_have_ended_and_expired_is_not_sent_again(own_server: Server, serving_there: Serving) -> None:
    gate = Gate()
    handle: DeploymentHandle[Any] = serving_there(Model, gate, result_ttl_s=1)
    disk = Disk(own_server)
    ref = await handle.remote("x")
    await asyncio.sleep(1.1)  # so old is the request: longer than its result would be there

    await asyncio.to_thread(restart_without, own_server, disk)

    with pytest.raises(RefNotFoundError):
        await asyncio.wait_for(ref, 20)
    gate.open()
    assert await handle.counted.call() == {"x": 1}


async def test_deployment_that_was_lost_with_its_requests_is_reported(
    own_server: Server, serving_there: Serving
) -> None:
    gate = Gate()
    handle: DeploymentHandle[Any] = serving_there(Model, gate)
    ref = await handle.remote("x")

    async with own_server.connect() as client:
        await client.flushall()
    own_server.kill()
    own_server.start()
    gate.open()

    with pytest.raises(RefNotFoundError):
        await asyncio.wait_for(ref, 20)
