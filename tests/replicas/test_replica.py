"""The life of a replica on a real server: it registers, serves, survives lost connections, drains, and says goodbye."""

import asyncio
import json
import os
import threading
import time
from typing import Any

import anyio
import pytest

from millstream.broker.connection import Control, run
from millstream.broker.control_scripts import backlog
from millstream.broker.keys import GROUP
from millstream.broker.registry import Registry
from millstream.broker.signed import Signer
from millstream.broker.supplying import Supplier
from millstream.broker.sweeper import bury
from millstream.errors import BrokerUnavailableError, TaskError
from millstream.replicas import replica as replica_module
from tests.helpers import read_states, wait_until
from tests.replica_helpers import Gate, Hosted, Stage, cut
from tests.timing import timed

pytestmark = pytest.mark.anyio


class Model:
    """Runs through a gate, and remembers what it ran."""

    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate or Gate()
        self.ran: list[Any] = []

    async def __call__(self, x: Any) -> Any:
        self.ran.append(x)
        return x

    async def held(self, x: Any) -> Any:
        await self.gate.wait()
        return x

    def held_in_thread(self, x: Any) -> Any:
        self.gate.wait_in_thread()
        return x


async def record_of(stage: Stage, redis: Control, replica: Hosted) -> Any:
    text: Any = await redis.hget(stage.keys.replicas, replica.name)
    return None if text is None else json.loads(text.partition(b" ")[2])


async def consumers(stage: Stage, redis: Control) -> set[str]:
    return {row["name"].decode() for lane in stage.keys.lanes for row in await redis.xinfo_consumers(lane, GROUP)}


# coming up


async def test_replica_is_on_record_with_a_lease_when_it_says_that_it_is_ready(stage: Stage, redis: Control) -> None:
    replica = await stage.start(Model)

    record = await record_of(stage, redis, replica)
    assert (record["state"], record["pid"], record["replica"]) == ("RUNNING", os.getpid(), replica.name)
    assert 0 < await redis.pttl(stage.keys.lease(replica.name)) <= 5000
    assert record["connections"] == (await replica.hears("ready"))["ready"]
    ours = {int(row["id"]): row["name"] for row in await redis.client_list()}
    assert [ours[one] for one in record["connections"]] == [f"ms:reads:{replica.name}", f"ms:writes:{replica.name}"]


async def test_constructor_that_raises_is_reported_with_its_traceback(stage: Stage, redis: Control) -> None:
    class Broken:
        def __init__(self) -> None:
            raise OSError("no GPU")

    replica = await stage.prepare(Broken)
    replica.begin()

    assert await replica.end() == 1
    (message,) = replica.heard
    assert message["failed"] == "its constructor raised OSError: no GPU"
    assert "test_replica.py" in message["traceback"] and 'raise OSError("no GPU")' in message["traceback"]
    assert await record_of(stage, redis, replica) is None


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
async def test_constructor_that_exits_is_a_failure_like_any_other(stage: Stage, error: BaseException) -> None:
    class Exits:
        def __init__(self) -> None:
            raise error

    replica = await stage.prepare(Exits)
    replica.begin()

    assert await replica.end() == 1
    assert type(error).__name__ in (await _first(replica))["failed"]


async def _first(replica: Hosted) -> Any:
    await wait_until(lambda: bool(replica.heard))
    return replica.heard[0]


async def test_constructor_may_be_a_coroutine(stage: Stage) -> None:
    class Loads:
        async def __init__(self) -> None:  # type: ignore[misc]
            await asyncio.sleep(0)
            self.weights = [1]

        async def __call__(self) -> Any:
            return self.weights

    await stage.start(Loads)

    assert await stage.handle.call() == [1]


async def test_replica_says_that_it_is_well_and_how_much_it_runs(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "HOUSEKEEPING_S", 0.02)
    gate = Gate()
    replica = await stage.start(Model, gate)
    futures = [stage.handle.held.call(x) for x in range(3)]

    await wait_until(lambda: {"well": 3} in replica.heard)
    gate.open()
    await asyncio.gather(*futures)

    await wait_until(lambda: replica.heard[-1] == {"well": 0})


async def test_replica_of_a_deployment_that_is_gone_ends(stage: Stage, redis: Control) -> None:
    replica = await stage.prepare(Model)
    await redis.delete(stage.keys.config)

    replica.begin()

    assert await replica.end() == 0
    assert await record_of(stage, redis, replica) is None
    await redis.delete(*stage.keys.owned)


async def test_replica_whose_deployment_is_deleted_drains(stage: Stage, redis: Control) -> None:
    replica = await stage.start(Model)

    await Registry(redis, stage.settings).delete("app")

    assert await replica.end() == 0


# lost connections


@pytest.mark.parametrize("lost", [("reads",), ("writes",), ("reads", "writes")])
async def test_replica_that_lost_a_connection_makes_new_ones_and_goes_on(
    stage: Stage, redis: Control, lost: tuple[str, ...]
) -> None:
    replica = await stage.start(Model)
    assert await stage.handle.call(1) == 1

    assert await cut(redis, *[f"ms:{one}:{replica.name}" for one in lost]) >= len(lost)

    assert await asyncio.wait_for(asyncio.gather(*[stage.handle.call(x) for x in range(100)]), 5) == list(range(100))
    await wait_until(lambda: sum("ready" in message for message in replica.heard) == 2)
    record = await record_of(stage, redis, replica)
    assert record["connections"] == replica.heard[-1].get("ready", record["connections"])


@pytest.mark.parametrize("lost", [("reads",), ("writes",), ("reads", "writes")])
async def test_results_of_what_ran_meanwhile_are_sent_over_the_new_connections(
    stage: Stage, redis: Control, lost: tuple[str, ...]
) -> None:
    gate = Gate()
    replica = await stage.start(Model, gate, max_ongoing_requests=10)
    futures = [stage.handle.held.call(x) for x in range(30)]
    await wait_until(lambda: gate.inside == 10)

    await cut(redis, *[f"ms:{one}:{replica.name}" for one in lost])
    gate.open()

    assert await asyncio.wait_for(asyncio.gather(*futures), 5) == list(range(30))
    assert gate.passed == 30


async def test_full_replica_that_lost_a_connection_does_not_wait_for_a_slot_to_make_a_new_one(
    stage: Stage, redis: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_module, "HOUSEKEEPING_S", 0.02)
    gate = Gate()
    replica = await stage.start(Model, gate, max_ongoing_requests=1)
    future = stage.handle.held.call(1)
    await wait_until(lambda: gate.inside == 1)

    await cut(redis, f"ms:writes:{replica.name}")

    await wait_until(lambda: sum("ready" in message for message in replica.heard) == 2)
    count = len(replica.heard)
    await wait_until(lambda: {"well": 1} in replica.heard[count:])
    gate.open()
    assert await future == 1


async def test_what_the_server_delivered_into_a_lost_connection_is_run_once(stage: Stage, redis: Control) -> None:
    replica = await stage.prepare(Model, name="r-ghost")
    refs = await stage.submit(redis, *range(3))
    await redis.xreadgroup(GROUP, "r-ghost", {stage.keys.lane("normal"): ">"})  # the reply that never arrived

    await replica.start()

    for x, ref in enumerate(refs):
        await wait_until(lambda ref=ref: _has(redis, stage.keys.result(ref)))
        assert await stage.read(redis, ref) == x
    assert replica.replica._intake is not None
    assert await stage.handle.call("after") == "after"


async def test_what_was_delivered_into_a_lost_connection_does_not_exceed_the_slots(
    stage: Stage, redis: Control
) -> None:
    gate = Gate()
    replica = await stage.prepare(Model, gate, name="r-ghost", max_ongoing_requests=1)
    refs = [
        (await stage.submit(redis, lane, lane=lane, method="held"))[0] for lane in ("returned", "high", "normal", "low")
    ]
    streams: Any = dict.fromkeys(stage.keys.lanes, ">")
    await redis.xreadgroup(GROUP, "r-ghost", streams, count=1)  # a blocked read brings one of each lane

    await replica.start()
    await wait_until(lambda: gate.inside == 1)
    states = await read_states(redis, stage.keys, refs)
    gate.open()

    assert states == ["running", "queued", "queued", "queued"]
    for ref in refs:
        await wait_until(lambda ref=ref: _has(redis, stage.keys.result(ref)))
    assert (gate.most, gate.passed) == (1, 4)


async def _has(redis: Control, key: str) -> bool:
    return bool(await redis.exists(key))


async def test_replica_makes_the_groups_anew_when_the_streams_were_deleted(stage: Stage, redis: Control) -> None:
    await stage.start(Model)
    assert await stage.handle.call(1) == 1

    await redis.delete(*stage.keys.lanes)

    assert await asyncio.wait_for(stage.handle.call(2), 5) == 2


async def test_full_server_lets_replicas_come_up_reconnect_and_leave(stage: Stage, redis: Control) -> None:
    first = await stage.start(Model)
    await redis.config_set("maxmemory", 1)
    try:
        second = await stage.start(Model)
        await cut(redis, f"ms:reads:{first.name}", f"ms:writes:{first.name}")
        await wait_until(lambda: sum("ready" in message for message in first.heard) == 2)

        assert (await first.drain(), await second.drain()) == (0, 0)
    finally:
        await redis.config_set("maxmemory", 0)


# draining


async def test_drained_replica_leaves_nothing_behind(stage: Stage, redis: Control) -> None:
    replica = await stage.start(Model)
    assert await stage.handle.call(1) == 1

    assert await replica.drain() == 0

    assert await record_of(stage, redis, replica) is None
    assert not await redis.exists(stage.keys.lease(replica.name))
    assert replica.name not in await consumers(stage, redis)

    async def is_gone() -> bool:
        return not [row for row in await redis.client_list() if row["name"].endswith(replica.name)]

    await wait_until(is_gone)


@pytest.mark.parametrize("method", ["held", "held_in_thread"])
async def test_draining_replica_finishes_what_it_runs_and_takes_nothing_new(
    stage: Stage, redis: Control, method: str
) -> None:
    gate = Gate()
    replica = await stage.start(Model, gate)
    running = stage.handle.options(method_name=method).call(1)
    await wait_until(lambda: gate.inside == 1)

    draining = asyncio.create_task(replica.drain())
    await wait_until(lambda: _is_draining(stage, redis, replica))
    late = stage.handle.call("late")
    with anyio.move_on_after(0.05):
        await asyncio.shield(late)

    assert not late.done() and not draining.done()
    gate.open()
    assert await draining == 0
    assert await running == 1
    assert (await run(redis, backlog(stage.keys))).waiting == 1
    await stage.start(Model)
    assert await late == "late"


async def _is_draining(stage: Stage, redis: Control, replica: Hosted) -> bool:
    record = await record_of(stage, redis, replica)
    return bool(record["state"] == "DRAINING")


@timed
async def test_idle_replica_drains_at_once_although_it_blocks_in_the_server(stage: Stage) -> None:
    replica = await stage.start(Model)
    await stage.handle.call(1)

    start = time.monotonic()
    await replica.drain()

    assert time.monotonic() - start < 0.5


async def test_draining_replica_hands_back_what_it_has_not_started_and_counts_no_attempt(
    stage: Stage, redis: Control
) -> None:
    gate = Gate()
    first = await stage.start(Model, gate, max_ongoing_requests=10, max_attempts=1)
    futures = [stage.handle.held_in_thread.call(x) for x in range(5)]  # one thread: one runs, the others wait for it
    await wait_until(lambda: gate.inside == 1 and len(first.replica._intake._executor.running) == 5)  # type: ignore[union-attr]

    draining = asyncio.create_task(first.drain())
    await wait_until(lambda: _are_waiting(stage, redis, 4))
    returned: Any = await redis.xrange(stage.keys.lane("returned"))
    (_, fields), *_ = returned
    second = await stage.start(Model, gate, max_ongoing_requests=10, max_attempts=1)
    gate.open()

    assert b"attempt" not in fields and b"history" not in fields
    assert await asyncio.gather(*futures) == list(range(5))
    assert await draining == 0
    assert gate.passed == 5
    await second.drain()


async def _are_waiting(stage: Stage, redis: Control, count: int) -> bool:
    return (await run(redis, backlog(stage.keys))).waiting == count


@timed
async def test_drain_ends_by_its_deadline_and_leaves_the_rest_for_others(stage: Stage, redis: Control) -> None:
    gate = Gate()
    replica = await stage.start(Model, gate, graceful_shutdown_timeout_s=0.1)
    future = stage.handle.held.call(1)
    await wait_until(lambda: gate.inside == 1)

    start = time.monotonic()
    assert await replica.drain() == 0

    assert 0.1 <= time.monotonic() - start < 1
    pending: Any = await redis.xpending(stage.keys.lane("normal"), GROUP)
    assert pending["pending"] == 1
    await _bury(stage, redis, replica)  # what its launcher does at its death
    gate.open()
    await stage.start(Model, gate)
    assert await future == 1


async def _bury(stage: Stage, redis: Control, replica: Hosted) -> None:
    async def ask(*command: Any, near: str = "") -> Any:
        return await redis.execute_command(*command)  # type: ignore[no-untyped-call]

    async def run_script(call: Any) -> Any:
        return await run(redis, call)

    supplier = Supplier(stage.settings, run_script)
    signer = Signer(stage.settings)
    await bury(run_script, ask, supplier, signer, stage.keys, replica.name, "died", expired=False)


@pytest.mark.parametrize("method", ["held", "stubborn"])
async def test_what_the_end_of_the_process_cancels_is_no_failure_of_the_request(
    stage: Stage, redis: Control, method: str
) -> None:
    gate = Gate()

    class Stubborn(Model):
        async def stubborn(self, x: Any) -> Any:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                raise ValueError("interrupted") from None

    replica = await stage.prepare(Stubborn, gate, graceful_shutdown_timeout_s=0)
    (ref,) = await stage.submit(redis, 1, method=method)

    # A process's whole life, the end of its loop included.
    process = threading.Thread(target=lambda: asyncio.run(replica.replica.run()))
    process.start()
    await wait_until(lambda: gate.inside == 1)
    await replica.control.send({"drain": True})
    await asyncio.to_thread(process.join)

    assert await read_states(redis, stage.keys, [ref]) == ["running"]
    gate.open()
    for sock in replica._sockets:
        sock.close()


async def test_draining_replica_that_lost_its_connections_still_delivers_its_results(
    stage: Stage, redis: Control
) -> None:
    gate = Gate()
    replica = await stage.start(Model, gate, max_attempts=1)
    futures = [stage.handle.held.call(x) for x in range(3)]
    await wait_until(lambda: gate.inside == 3)
    draining = asyncio.create_task(replica.drain())
    await wait_until(lambda: _is_draining(stage, redis, replica))

    await cut(redis, f"ms:reads:{replica.name}", f"ms:writes:{replica.name}")
    gate.open()

    assert await draining == 0
    assert await asyncio.wait_for(asyncio.gather(*futures), 5) == [0, 1, 2]
    assert await record_of(stage, redis, replica) is None


async def test_replica_told_to_drain_in_an_outage_delivers_its_results_after_it(stage: Stage, redis: Control) -> None:
    gate = Gate()
    replica = await stage.start(Model, gate, max_attempts=1)
    future = stage.handle.held.call(1)
    await wait_until(lambda: gate.inside == 1)

    for link in (replica.replica._reads, replica.replica._writes):
        assert link is not None
        link.close()
    draining = asyncio.create_task(replica.drain())
    with anyio.move_on_after(0.05):
        await asyncio.shield(draining)
    gate.open()

    assert await draining == 0
    assert await asyncio.wait_for(future, 5) == 1


@timed
async def test_idle_replica_told_to_drain_in_an_outage_does_not_wait_for_its_end(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreachable(*_: Any, **__: Any) -> Any:
        raise BrokerUnavailableError("nobody answers")

    replica = await stage.start(Model)
    monkeypatch.setattr(replica_module, "dial", unreachable)
    monkeypatch.setattr(replica_module, "dial_everywhere", unreachable)
    for link in (replica.replica._reads, replica.replica._writes):
        assert link is not None
        link.close()

    start = time.monotonic()
    assert await replica.drain() == 0

    assert time.monotonic() - start < 1


async def test_replica_drains_when_its_launcher_is_gone(stage: Stage, redis: Control) -> None:
    gate = Gate()
    replica = await stage.start(Model, gate)
    future = stage.handle.held.call(1)
    await wait_until(lambda: gate.inside == 1)

    ending = asyncio.create_task(replica.orphan())
    await wait_until(lambda: _is_draining(stage, redis, replica))
    gate.open()

    assert await ending == 0
    assert await future == 1
    assert await record_of(stage, redis, replica) is None


async def test_orphaned_replica_renews_its_own_lease_while_it_drains(
    stage: Stage, redis: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_module, "HOUSEKEEPING_S", 0.02)
    gate = Gate()
    replica = await stage.start(Model, gate)
    future = stage.handle.held.call(1)
    await wait_until(lambda: gate.inside == 1)
    ending = asyncio.create_task(replica.orphan())
    await wait_until(lambda: _is_draining(stage, redis, replica))

    await redis.delete(stage.keys.lease(replica.name))

    await wait_until(lambda: _has(redis, stage.keys.lease(replica.name)))
    gate.open()
    assert (await ending, await future) == (0, 1)


async def test_replica_renews_its_lease_though_its_launcher_stands_still(
    stage: Stage, redis: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_module, "HOUSEKEEPING_S", 0.02)
    replica = await stage.start(Model)

    await redis.pexpire(stage.keys.lease(replica.name), 60)

    async def is_renewed() -> bool:
        return await redis.pttl(stage.keys.lease(replica.name)) > 1000

    await wait_until(is_renewed)


async def test_replica_drains_when_it_is_stopped(stage: Stage) -> None:
    replica = await stage.start(Model)

    replica.replica.stop()

    assert await replica.end() == 0


async def test_system_exit_of_a_request_does_not_end_the_replica(stage: Stage) -> None:
    class Exits(Model):
        async def leave(self) -> None:
            await asyncio.sleep(0)
            raise SystemExit(3)

    await stage.start(Exits)

    with pytest.raises(TaskError, match="SystemExit"):
        await stage.handle.leave.call()
    assert await stage.handle.call(1) == 1
