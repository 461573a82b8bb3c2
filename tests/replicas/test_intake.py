"""What a replica takes, in which order, and how much of it."""

import asyncio
import logging
from typing import Any

import anyio
import pytest

from millstream.broker.connection import Control, run
from millstream.broker.control_scripts import backlog
from millstream.replicas import intake
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Stage

pytestmark = pytest.mark.anyio


class Model:
    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate or Gate()
        self.ran: list[Any] = []

    async def __call__(self, x: Any) -> None:
        await asyncio.sleep(0)
        self.ran.append(x)

    async def held(self, x: Any) -> None:
        self.ran.append(x)
        await self.gate.wait()

    async def list_ran(self) -> list[Any]:
        return self.ran


async def ran(stage: Stage) -> list[Any]:
    values: list[Any] = await stage.handle.list_ran.call()
    return values


async def are_open(stage: Stage, redis: Control, count: int) -> bool:
    return await redis.hlen(stage.keys.open) == count


async def test_lanes_are_emptied_in_the_order_of_their_urgency_and_each_in_its_own(
    stage: Stage, redis: Control
) -> None:
    replica = await stage.prepare(Model, max_ongoing_requests=1)
    for lane in ("low", "normal", "high", "returned"):
        await stage.submit(redis, *[f"{lane} {n}" for n in range(3)], lane=lane)

    await replica.start()

    await wait_until(lambda: are_open(stage, redis, 0))
    expected = [f"{lane} {n}" for lane in ("returned", "high", "normal", "low") for n in range(3)]
    assert await ran(stage) == expected


async def test_urgent_request_does_not_wait_for_a_deep_lane_to_be_emptied(stage: Stage, redis: Control) -> None:
    gate = Gate()
    replica = await stage.prepare(Model, gate, max_ongoing_requests=4 * intake.DIRECT_FROM)
    await stage.submit(redis, *range(1000))
    await replica.start()
    await wait_until(lambda: _has_run_some(replica))

    await stage.submit(redis, "urgent", lane="high")
    await wait_until(lambda: are_open(stage, redis, 0))

    order = await ran(stage)
    assert len(order) == 1001
    assert order.index("urgent") < 900, "it came after most of what was there before"


async def test_with_a_slot_or_two_nothing_urgent_is_passed_by_what_was_there_before(
    stage: Stage, redis: Control
) -> None:
    gate = Gate()
    replica = await stage.prepare(Model, gate, max_ongoing_requests=1)
    await stage.submit(redis, "first", method="held")
    await stage.submit(redis, *range(20))
    await replica.start()
    await wait_until(lambda: gate.inside == 1)

    await stage.submit(redis, "urgent", lane="high")  # at once, while a deep lane is known
    gate.open()

    await wait_until(lambda: are_open(stage, redis, 0))
    assert await ran(stage) == ["first", "urgent", *range(20)]


def _has_run_some(replica: Any) -> bool:
    return bool(replica.replica._intake._executor._served.instance.ran)


async def test_requests_submitted_at_once_are_shared_between_idle_replicas(stage: Stage, redis: Control) -> None:
    gates = [Gate() for _ in range(4)]
    for gate in gates:
        await stage.start(Model, gate)

    await stage.submit(redis, *range(40), method="held")

    await wait_until(lambda: sum(gate.inside for gate in gates) == 40)
    assert min(gate.inside for gate in gates) >= 4, [gate.inside for gate in gates]
    for gate in gates:
        gate.open()
    await wait_until(lambda: are_open(stage, redis, 0))


async def test_only_replica_takes_all_it_has_slots_for_and_leaves_the_rest(stage: Stage, redis: Control) -> None:
    gate = Gate()
    await stage.start(Model, gate, max_ongoing_requests=7)

    await stage.submit(redis, *range(20), method="held")
    await wait_until(lambda: gate.inside == 7)
    with anyio.move_on_after(0.03):
        await anyio.sleep_forever()

    reading = await run(redis, backlog(stage.keys))
    assert (reading.in_flight, reading.waiting) == (7, 13)
    gate.open()
    await wait_until(lambda: are_open(stage, redis, 0))
    assert gate.most == 7


async def test_idle_replica_takes_a_new_request_at_once(stage: Stage, redis: Control) -> None:
    await stage.start(Model)
    with anyio.move_on_after(0.05):  # it blocks in the server by now
        await anyio.sleep_forever()

    await stage.submit(redis, 1, lane="low")

    await wait_until(lambda: are_open(stage, redis, 0), timeout_s=0.5)


async def test_entry_that_is_no_request_stops_nothing_and_is_a_dead_letter(
    stage: Stage, redis: Control, caplog: pytest.LogCaptureFixture
) -> None:
    await stage.start(Model)

    entry: Any = await redis.xadd(stage.keys.lane("normal"), {"what": "ever"})
    await stage.submit(redis, 1)

    await wait_until(lambda: are_open(stage, redis, 0))
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1 and f"entry {entry.decode()} in {stage.keys.lane('normal')}" in errors[0].getMessage()
    await wait_until(lambda: is_empty(redis, stage.keys.lane("normal")))
    rows: Any = await redis.xrange(stage.keys.dead)
    ((_, letter),) = rows
    assert letter[b"what"] == b"ever" and b"some other program wrote it" in letter[b"history"]


async def is_empty(redis: Control, lane: str) -> bool:
    return await redis.xlen(lane) == 0


async def reads(redis: Control) -> int:
    """How often lanes have been read, in scripts as well. Replicas that wait do so every few seconds, too."""
    stats: dict[str, Any] = await redis.info("commandstats")
    return int(stats["cmdstat_xreadgroup"]["calls"])


async def test_requests_that_come_one_by_one_cost_few_reads_and_a_burst_after_them_comes_in_batches(
    stage: Stage, redis: Control
) -> None:
    await stage.start(Model)
    for x in range(10):
        await stage.handle.call(x)

    before = await reads(redis)
    for x in range(100):
        await stage.handle.call(x)
    one_by_one = await reads(redis) - before
    await stage.submit(redis, *range(300))
    await wait_until(lambda: are_open(stage, redis, 0))
    burst = await reads(redis) - before - one_by_one

    assert one_by_one < 100 * 3, "a claim reads four lanes: after each request that would be five reads"
    assert burst < 100
