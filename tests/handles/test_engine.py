"""The engine against lost connections, lost messages and lost servers: nothing is lost with them, nothing runs twice."""

import asyncio
import random
import socket
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError
from millstream.handles import chores, engines, lines, patrol, submitter
from millstream.handles.ref import ObjectRef
from millstream.handles.route import Route
from tests.helpers import nodes_of, wait_until
from tests.replica_helpers import Gate, Serving, cut, wires
from tests.servers import Server

pytestmark = pytest.mark.anyio


class Ledger:
    """Notes every run."""

    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate or Gate()
        self.runs: Counter[Any] = Counter()

    async def __call__(self, x: Any) -> Any:
        self.runs[x] += 1
        return x

    async def held(self, x: Any) -> Any:
        self.runs[x] += 1
        await self._gate.wait()
        return x

    async def slowly(self, x: Any) -> Any:
        self.runs[x] += 1
        await asyncio.sleep(0.001)
        return x

    async def counted(self) -> Counter[Any]:
        return self.runs


async def cut_ours(redis: Control, *what: str) -> int:
    """Cut this loop's connections: "client" for commands, "replies" for results."""
    name = engines.current().name
    return await cut(redis, *[f"ms:{one}:{name}" for one in what or ("client", "replies")])


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What usually takes seconds takes fractions of one."""
    monkeypatch.setattr(lines, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(patrol, "LOOK_AFTER_S", 0.05)


# connections


@pytest.mark.parametrize("anyio_backend", ["asyncio", ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"])
async def test_burst_survives_the_loss_of_both_connections_and_nothing_runs_twice(
    serving: Serving, redis: Control
) -> None:
    handle, rng = serving(Ledger, replicas=1), random.Random(2)
    await handle.call("first")
    values: list[int] = []

    async def caller(numbers: range) -> None:
        for x in numbers:
            values.append(await handle.slowly.call(x))

    async with anyio.create_task_group() as tasks:
        for start in range(0, 2000, 20):
            tasks.start_soon(caller, range(start, start + 20))
        for many in sorted(rng.sample(range(100, 1500), 4)):
            await wait_until(lambda many=many: len(values) >= many and engines.current().lines.is_connected)
            assert await cut_ours(redis) == 2 * len(await nodes_of(redis))

    assert sorted(values) == list(range(2000))
    runs = await handle.counted.call()
    assert runs == Counter(["first", *range(2000)])


async def test_burst_at_once_survives_the_loss_of_both_connections(serving: Serving, redis: Control) -> None:
    handle = serving(Ledger)
    await handle.call("first")

    futures = [handle.slowly.call(x) for x in range(2000)]
    await cut_ours(redis)

    assert await asyncio.wait_for(asyncio.gather(*futures), 20) == list(range(2000))
    assert set((await handle.counted.call()).values()) == {1}


@pytest.mark.parametrize("what", ["client", "replies"])
async def test_results_of_what_ran_during_the_outage_arrive_after_it(
    serving: Serving, redis: Control, what: str
) -> None:
    gate = Gate()
    handle = serving(Ledger, gate)
    futures = [handle.held.call(x) for x in range(300)]
    await wait_until(lambda: gate.inside == 100)
    commands = engines.current().lines.commands
    assert commands is not None

    await cut_ours(redis, what)
    gate.open()

    assert await asyncio.wait_for(asyncio.gather(*futures), 5) == list(range(300))
    assert engines.current().lines.commands is not commands


@pytest.mark.parametrize("how", ["call", "delayed", "dependent", "by id", "another deployment"])
async def test_request_made_in_the_very_moment_of_the_loss_is_sent_after_it(
    serving: Serving, redis: Control, how: str
) -> None:
    handle, other = serving(Ledger), serving(Ledger)
    ref = await handle.remote(1)
    make: Callable[[], Any] = {
        "call": lambda: handle.call(1),
        "delayed": lambda: handle.options(delay_s=0.01).call(1),
        "dependent": lambda: handle.call(ref),
        "by id": lambda: asyncio.ensure_future(_value(ObjectRef.from_id(ref.id))),
        "another deployment": lambda: other.call(1),
    }[how]
    commands = engines.current().lines.commands
    made: list[Any] = []
    assert commands is not None
    commands.lost.add_done_callback(lambda _: made.append(make()))  # before the engine itself has noticed

    await cut_ours(redis)
    await wait_until(lambda: bool(made))

    assert await asyncio.wait_for(made[0], 5) == 1


async def _value(ref: ObjectRef) -> Any:
    return await ref


async def test_chain_survives_the_loss_of_both_connections(serving: Serving, redis: Control) -> None:
    gate = Gate()
    handle = serving(Ledger, gate)
    task = handle.held.remote(1)
    for _ in range(10):
        task = handle.remote(task)
    await cut_ours(redis)

    gate.open()

    assert await asyncio.wait_for(await task, 5) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio", ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"])
async def test_connection_whose_other_end_vanished_is_ended_by_the_kernel_within_the_patience(serving: Serving) -> None:
    await serving(Ledger).call(1)

    for link in wires(engines.current().lines.commands) + wires(engines.current().lines.replies):
        assert link._transport is not None
        sock = link._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if sys.platform == "linux":
            idle_s, probe_s, probes = (
                sock.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle_s + probe_s * probes <= lines.PATIENCE_S
            assert 0 < sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 1000 * lines.PATIENCE_S


async def test_first_burst_of_an_engine_subscribes_once(serving: Serving, redis: Control) -> None:
    handle = serving(Ledger)
    await redis.config_resetstat()

    await asyncio.gather(*[handle.call(x) for x in range(200)])

    stats: Any = await redis.info("commandstats")
    assert stats["cmdstat_ssubscribe"]["calls"] == 1


async def test_order_of_the_requests_of_a_caller_is_kept(serving: Serving) -> None:
    seen: list[int] = []

    async def note(x: int) -> None:
        seen.append(x)

    handle = serving(note, max_ongoing_requests=1)
    await asyncio.gather(*[handle.call(x) for x in range(1000)])

    assert seen == list(range(1000))


# messages


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("how", ["call", "matched"])
async def test_lost_message_is_made_up_for(serving: Serving, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    handle = serving(Ledger)
    await handle.call("first")
    swallowed = list[bytes]()
    for wire in wires(engines.current().lines.replies):
        monkeypatch.setattr(wire, "_on_message", swallowed.append)

    if how == "call":
        assert await asyncio.wait_for(handle.call(1), 5) == 1
    else:
        assert await asyncio.wait_for(await handle.slowly.remote(1), 5) == 1

    assert swallowed


@pytest.mark.usefixtures("impatient")
async def test_lost_messages_of_many_are_made_up_for_a_bounded_number_at_a_time(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = serving(Ledger)
    await handle.call("first")
    engine, looked_at = engines.current(), list[int]()
    look_at = engine._patrol._look_at

    def counted(route: Route, refs: list[bytes]) -> None:
        looked_at.append(len(refs))
        look_at(route, refs)

    for wire in wires(engine.lines.replies):
        monkeypatch.setattr(wire, "_on_message", lambda message: None)
    monkeypatch.setattr(engine._patrol, "_look_at", counted)
    monkeypatch.setattr(patrol, "LOOK_AT_ONCE", 20)

    values = await asyncio.wait_for(asyncio.gather(*[handle.call(x) for x in range(200)]), 10)

    assert values == list(range(200))
    assert max(looked_at) <= 20


# the server


async def test_restart_of_the_server_in_mid_burst_loses_nothing(
    start_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server("--appendonly", "yes", "--appendfsync", "always")
    engines.use(Settings(server.url, secret_key=b"a secret for tests"))
    serving = Serving(engines.settings())
    try:
        handle = serving(Ledger)
        futures = [handle.slowly.call(x) for x in range(1000)]
        await wait_until(lambda: sum(f.done() for f in futures) > 100)

        server.kill()
        server.start()

        assert await asyncio.wait_for(asyncio.gather(*futures), 20) == list(range(1000))
        runs = await handle.counted.call()
        assert set(runs) == set(range(1000))
    finally:
        await asyncio.to_thread(serving.close)
        engines.close_all()


async def test_server_that_takes_no_writes_for_a_while_is_waited_for(
    start_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    engines.use(Settings(server.url, secret_key=b"a secret for tests"))
    serving = Serving(engines.settings())
    try:
        handle = serving(Ledger)
        await handle.call(0)
        async with server.connect() as client:
            await client.replicaof("127.0.0.1", "1")  # as after a failover: it answers READONLY
            futures = [handle.call(x) for x in range(1, 50)]
            with anyio.move_on_after(0.2):
                await asyncio.wait(futures)
            assert not any(future.done() for future in futures)
            await client.replicaof("NO", "ONE")

        assert await asyncio.wait_for(asyncio.gather(*futures), 5) == list(range(1, 50))
    finally:
        await asyncio.to_thread(serving.close)
        engines.close_all()


@pytest.mark.parametrize("how", ["call", "delayed", "by id"])
async def test_server_that_does_not_come_back_is_given_up_on(
    start_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    for module in (chores, submitter):
        monkeypatch.setattr(module, "PATIENCE_S", 0.3)
    monkeypatch.setattr(lines, "PATIENCE_S", 0.3)
    server = start_server()
    engines.use(Settings(server.url, secret_key=b"a secret for tests"))
    serving = Serving(engines.settings())
    handle = serving(Ledger)
    ref = await handle.remote(1)
    await asyncio.to_thread(serving.close)

    server.kill()
    ways: dict[str, Callable[[], Any]] = {
        "call": lambda: handle.call(1),
        "delayed": lambda: handle.options(delay_s=0.01).call(1),
        "by id": lambda: ObjectRef.from_id(ref.id),
    }
    with pytest.raises(BrokerUnavailableError):
        await asyncio.wait_for(ways[how](), 5)

    assert await ref == 1, "what has arrived stays"
    engines.close_all()


@pytest.mark.usefixtures("impatient")
async def test_request_that_vanished_with_the_data_of_its_server_is_reported(serving: Serving, redis: Control) -> None:
    keys = DeploymentKeys("ms", "app.Ledger")
    future = serving.deploy_only(Ledger).call(1)
    await wait_until(lambda: _exists(redis, keys.open))
    with anyio.move_on_after(0.1):
        await asyncio.shield(future)

    await redis.delete(*keys.lanes, keys.open)

    with pytest.raises(Exception, match="has no result here"):
        await asyncio.wait_for(future, 10)


async def _exists(redis: Control, key: str) -> bool:
    return bool(await redis.exists(key))


async def test_request_refused_while_the_server_loads_is_not_taken_for_unknown(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question after it comes when the server has just loaded, and knows nothing of it yet."""
    handle = serving(Ledger)
    assert await handle.call("before") == "before"
    engine = engines.current()
    commands, refused = engine.lines.commands, list[Callable[[Any], None]]()
    assert commands is not None
    start = commands.start

    def loading(call: Any, callback: Callable[[Any], None]) -> None:
        if call.script.name == "submit" and not refused:
            refused.append(callback)
        elif call.script.name == "watch" and len(refused) == 1:
            refused[0](BrokerUnavailableError("the server cannot take commands now (LOADING)"))
            refused.append(callback)
            start(call, callback)
        else:
            start(call, callback)

    monkeypatch.setattr(commands, "start", loading)
    future = handle.call("asked about")
    (ref,) = engine.pending
    engine.look_at(engine.route(engine.pending[ref].codec.tag), [ref])

    assert await asyncio.wait_for(future, 10) == "asked about"
    assert len(refused) == 2
    assert (await handle.counted.call())["asked about"] == 1
