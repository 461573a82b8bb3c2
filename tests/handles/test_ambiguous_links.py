"""A real engine and real replicas behind a proxy that cuts their connections anywhere, within a request or a reply: each
request runs once, each caller gets its own result, and nobody hangs."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from millstream.broker.connection import Control
from millstream.config import Settings
from millstream.errors import RequestCancelledError
from millstream.handles import engines, lines, patrol
from millstream.handles.handle import DeploymentHandle
from millstream.replicas import orders, replica
from tests.proxy import Limits, Proxy
from tests.replica_helpers import Serving
from tests.servers import Server

pytestmark = [pytest.mark.anyio, pytest.mark.single_server, pytest.mark.usefixtures("impatient")]

SEEDS = pytest.mark.parametrize("seed", range(2))
LIVES_BYTES = 2_000, 12_000  # of a connection, in one direction: the first call of a script takes some 4,000
CUTS = 15  # then the network is well again


class Model:
    """Notes every run, by its name, for all replicas together."""

    def __init__(self, runs: Counter[str]) -> None:
        self._runs = runs

    async def echo(self, name: str, value: Any = None) -> Any:
        self._runs[name] += 1
        await asyncio.sleep(0.001)
        return name if value is None else value

    async def count(self, name: str, many: int) -> AsyncIterator[int]:
        self._runs[name] += 1
        for number in range(many):
            yield number

    async def for_ever(self, name: str) -> None:
        self._runs[name] += 1
        await asyncio.Event().wait()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What usually takes seconds takes fractions of one."""
    monkeypatch.setattr(lines, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(patrol, "LOOK_AFTER_S", 0.1)
    monkeypatch.setattr(replica, "HOUSEKEEPING_S", 0.1)
    monkeypatch.setattr(orders, "LOOK_AFTER_S", 0.1)


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server.url) as proxy:
        yield proxy


@pytest.fixture
def runs() -> Counter[str]:
    return Counter()


@pytest.fixture
def handle(proxy: Proxy, redis: Control, runs: Counter[str]) -> Iterator[DeploymentHandle[Any]]:
    """Everybody goes through the proxy: the engine, the replicas, and who deploys."""
    engines.use(Settings(proxy.url, secret_key=b"a secret for tests"))
    serving = Serving(engines.settings())
    yield serving(Model, runs, replicas=2, max_ongoing_requests=20)
    proxy.pass_all()
    serving.close()
    engines.close_all()


def cut_at_random(proxy: Proxy, seed: int) -> None:
    """Every connection dies young, at a byte of its own; those that are open die now."""
    rng = random.Random(seed)

    def fate() -> Limits:
        if proxy.cuts >= CUTS:
            return Limits()
        life = rng.randint(*LIVES_BYTES)
        return Limits(sent=life) if rng.random() < 0.5 else Limits(received=life)

    proxy.cut_each(fate)
    proxy.cut()


@SEEDS
async def test_calls_run_once_each_and_bring_their_own_results(
    handle: Any, proxy: Proxy, runs: Counter[str], seed: int
) -> None:
    names = [f"call {number}" for number in range(900)]
    await handle.echo.call("first")
    cut_at_random(proxy, seed)

    async def caller(some: list[str]) -> list[str]:
        return [await handle.echo.call(name) for name in some]

    values = await asyncio.wait_for(asyncio.gather(*[caller(names[start::30]) for start in range(30)]), 60)

    assert values == [names[start::30] for start in range(30)]
    assert runs == Counter(["first", *names])
    assert proxy.cuts >= 3


@SEEDS
async def test_map_runs_each_item_once_and_keeps_their_order(
    handle: Any, proxy: Proxy, runs: Counter[str], seed: int
) -> None:
    names = [f"item {number}" for number in range(900)]
    await handle.echo.call("first")
    cut_at_random(proxy, seed)

    async with asyncio.timeout(60):
        values = [value async for value in handle.echo.map(names, max_in_flight=50)]

    assert values == names
    assert runs == Counter(["first", *names])
    assert proxy.cuts >= 3


@SEEDS
async def test_chains_run_each_link_once(handle: Any, proxy: Proxy, runs: Counter[str], seed: int) -> None:
    await handle.echo.call("first")
    cut_at_random(proxy, seed)

    async def chain(number: int) -> Any:
        task = handle.echo.remote(f"{number} 0", number)
        for link in range(1, 8):
            task = handle.echo.remote(f"{number} {link}", task)
        return await (await task)

    values = await asyncio.wait_for(asyncio.gather(*[chain(number) for number in range(40)]), 60)

    assert values == list(range(40))
    assert runs == Counter(["first", *[f"{number} {link}" for number in range(40) for link in range(8)]])
    assert proxy.cuts >= 3


@SEEDS
async def test_streams_bring_every_item_once_and_in_order(
    handle: Any, proxy: Proxy, runs: Counter[str], seed: int
) -> None:
    await handle.echo.call("first")
    cut_at_random(proxy, seed)

    async def read(name: str) -> list[int]:
        return [item async for item in handle.count.options(max_ahead=20).stream(name, 500)]

    names = [f"stream {number}" for number in range(12)]
    items = await asyncio.wait_for(asyncio.gather(*[read(name) for name in names]), 60)

    assert items == [list(range(500))] * 12
    assert runs == Counter(["first", *names])
    assert proxy.cuts >= 3


@SEEDS
async def test_cancels_end_what_they_mean_and_nothing_else(
    handle: Any, proxy: Proxy, runs: Counter[str], seed: int
) -> None:
    await handle.echo.call("first")
    cut_at_random(proxy, seed)

    async def cancelled(number: int) -> str:
        ref = await handle.for_ever.options(block_until="queued").remote(f"for ever {number}")
        await ref.acancel()
        with pytest.raises(RequestCancelledError):
            await ref
        value: str = await handle.echo.call(f"beside {number}")
        return value

    async with asyncio.timeout(60):
        for start in range(0, 120, 20):
            beside = await asyncio.gather(*[cancelled(number) for number in range(start, start + 20)])
            assert beside == [f"beside {number}" for number in range(start, start + 20)]

    assert max(runs.values()) == 1
    assert proxy.cuts >= 3


@pytest.mark.parametrize("piece", [7, 100])
async def test_requests_and_replies_in_small_pieces_change_nothing(
    handle: Any, proxy: Proxy, runs: Counter[str], piece: int
) -> None:
    proxy.piece = piece
    names = [f"call {number}" for number in range(100)]

    assert await asyncio.wait_for(asyncio.gather(*[handle.echo.call(name) for name in names]), 60) == names
    assert [item async for item in handle.count.stream("stream", 30)] == list(range(30))
    assert max(runs.values()) == 1


async def test_network_that_swallows_everything_for_a_while_is_waited_for(
    handle: Any, proxy: Proxy, runs: Counter[str]
) -> None:
    await handle.echo.call("first")
    proxy.hold()
    calls = [handle.echo.call(f"call {number}") for number in range(200)]
    done, _ = await asyncio.wait(calls, timeout=0.3)
    assert not done

    proxy.cut()  # what was swallowed is gone, and nobody is told whether it came through
    proxy.release()

    assert await asyncio.wait_for(asyncio.gather(*calls), 60) == [f"call {number}" for number in range(200)]
    assert max(runs.values()) == 1
