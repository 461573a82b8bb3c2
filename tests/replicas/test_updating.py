"""A replica takes another config over: the launcher's end of its socket is in the test's hands."""

import asyncio
import json
import threading
from typing import Any

import pytest

from millstream.broker.connection import Control
from millstream.broker.registry import Registry
from millstream.config import DeploymentConfig
from tests.helpers import read_states, wait_until
from tests.replica_helpers import GRACE_S, Gate, Hosted, Stage, cut

pytestmark = pytest.mark.anyio


class Model:
    def __init__(self, gate: Gate | None = None, way: Gate | None = None) -> None:
        self.gate, self.way = gate or Gate(), way
        self.config: Any = None
        self.seen: list[Any] = []

    async def reconfigure(self, config: Any) -> None:
        self.seen.append(config)
        if self.way is not None:
            await self.way.wait()
        if config == "bad":
            self.config = "half"
            raise ValueError("no such config")
        self.config = config

    async def __call__(self) -> Any:
        return self.config

    async def held(self, x: Any) -> Any:
        before = self.config
        await self.gate.wait()
        assert self.config == before, "reconfigured while it ran"
        return x

    async def history(self) -> Any:
        return self.seen


class InThread:
    def __init__(self, way: Gate) -> None:
        self.way, self.config = way, None

    def reconfigure(self, config: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.way.wait_in_thread()
        self.config = config

    async def __call__(self) -> Any:
        return self.config


async def tell(replica: Hosted, revision: str, **options: Any) -> None:
    config = DeploymentConfig().updated({"graceful_shutdown_timeout_s": GRACE_S, **options})
    await replica.control.send({"update": revision, "config": config.to_json()})


async def settled(replica: Hosted, revision: str) -> None:
    await wait_until(lambda: {"configured": revision} in replica.heard, what=f"{revision} to be taken over")


def is_paused(replica: Hosted) -> bool:
    intake = replica.replica._intake
    return intake is not None and intake.is_paused


def has_told(replica: Hosted, revision: str) -> bool:
    updater = replica.replica._updater
    return updater is not None and updater._newest.revision == revision


async def record_of(stage: Stage, redis: Control, replica: Hosted) -> Any:
    text: Any = await redis.hget(stage.keys.replicas, replica.name)
    return json.loads(text.partition(b" ")[2])


async def test_new_user_config_goes_to_reconfigure_and_the_record_says_so(stage: Stage, redis: Control) -> None:
    replica = await stage.start(Model)

    await tell(replica, "c1", user_config={"n": 1})
    await settled(replica, "c1")

    assert await stage.handle.call() == {"n": 1}
    assert (await record_of(stage, redis, replica))["revision"] == "c1"
    assert (await record_of(stage, redis, replica))["state"] == "RUNNING"


async def test_blocking_reconfigure_does_not_hold_up_the_loop(stage: Stage) -> None:
    way = Gate()
    replica = await stage.start(InThread, way)

    await tell(replica, "c1", user_config=1)
    await wait_until(lambda: way.inside == 1)
    way.open()
    await settled(replica, "c1")

    assert await stage.handle.call() == 1


async def test_same_user_config_is_not_handed_over_again(stage: Stage) -> None:
    gate = Gate()
    replica = await stage.start(Model, gate, user_config=1)
    running = stage.handle.held.call("x")
    await wait_until(lambda: gate.inside == 1)

    await tell(replica, "c1", user_config=1, max_attempts=1)
    await settled(replica, "c1")  # and does not wait for what runs

    gate.open()
    assert await running == "x"
    assert await stage.handle.history.call() == [1]


async def test_number_of_slots_changes_in_both_directions(stage: Stage) -> None:
    gate = Gate()
    replica = await stage.start(Model, gate, max_ongoing_requests=1)
    futures = [stage.handle.held.call(x) for x in range(6)]
    await wait_until(lambda: gate.inside == 1)

    await tell(replica, "c1", max_ongoing_requests=4)
    await wait_until(lambda: gate.inside == 4)
    await tell(replica, "c2", max_ongoing_requests=2)
    await settled(replica, "c2")
    assert replica.replica._intake is not None and replica.replica._intake.free == -2

    gate.open()
    assert await asyncio.gather(*futures) == list(range(6))
    assert gate.most == 4


async def test_results_are_kept_as_long_as_the_new_config_says(stage: Stage, redis: Control) -> None:
    replica = await stage.start(Model)
    await tell(replica, "c1", result_ttl_s=7)
    await settled(replica, "c1")

    (ref,) = await stage.submit(redis, "x", method="held")
    assert replica.replica._intake is not None
    replica.replica._intake._executor._served.instance.gate.open()

    await wait_until(lambda: _has_ended(stage, redis, ref))
    assert 0 < await redis.ttl(stage.keys.result(ref)) <= 7


async def _has_ended(stage: Stage, redis: Control, ref: str) -> bool:
    return bool(await redis.exists(stage.keys.result(ref)))


@pytest.mark.parametrize("slots", [1, 10])
async def test_what_runs_ends_first_and_what_comes_waits_in_its_queue(stage: Stage, redis: Control, slots: int) -> None:
    gate, way = Gate(), Gate()
    replica = await stage.start(Model, gate, way, max_ongoing_requests=slots)
    running = stage.handle.held.call("x")
    await wait_until(lambda: gate.inside == 1)

    await tell(replica, "c1", user_config=1, max_ongoing_requests=slots)
    await wait_until(lambda: is_paused(replica))
    late = await stage.submit(redis, *range(5), method="held")
    assert way.inside == 0
    gate.open()
    await wait_until(lambda: way.inside == 1)
    states = await read_states(redis, stage.keys, late)
    way.open()
    await settled(replica, "c1")

    assert await running == "x"
    assert states == ["queued"] * 5
    for ref in late:
        await wait_until(lambda ref=ref: _has_ended(stage, redis, ref))


async def test_idle_replica_is_woken_for_it(stage: Stage) -> None:
    replica = await stage.start(Model)
    intake = replica.replica._intake
    assert intake is not None
    await wait_until(lambda: intake._may_start_more)  # it blocks in the server, for up to 2.5 s

    async with asyncio.timeout(1):
        await tell(replica, "c1", user_config=1)
        await settled(replica, "c1")


async def test_of_several_configs_the_last_one_counts(stage: Stage) -> None:
    gate = Gate()
    replica = await stage.start(Model, gate)
    running = stage.handle.held.call("x")
    await wait_until(lambda: gate.inside == 1)

    for n in range(1, 5):
        await tell(replica, f"c{n}", user_config=n)
    await wait_until(lambda: has_told(replica, "c4"))
    gate.open()
    await settled(replica, "c4")

    assert await running == "x"
    assert await stage.handle.history.call() == [4]


async def test_config_that_went_back_while_it_waited_is_not_handed_over(stage: Stage) -> None:
    gate = Gate()
    replica = await stage.start(Model, gate, user_config=0)
    running = stage.handle.held.call("x")
    await wait_until(lambda: gate.inside == 1)

    await tell(replica, "c1", user_config=1)
    await wait_until(lambda: is_paused(replica))
    await tell(replica, "c0", user_config=0)
    await wait_until(lambda: has_told(replica, "c0"))
    gate.open()
    await settled(replica, "c0")

    assert await running == "x"
    assert await stage.handle.history.call() == [0]


async def test_idle_replica_is_given_the_time_to_stop_reading(stage: Stage) -> None:
    replica = await stage.start(Model, graceful_shutdown_timeout_s=0)

    await tell(replica, "c1", user_config=1)

    await settled(replica, "c1")


# what goes wrong


async def test_refused_config_leaves_the_former_one_in_force(stage: Stage, redis: Control) -> None:
    replica = await stage.start(Model, user_config="good")

    await tell(replica, "c1", user_config="bad")
    said = await replica.hears("refused")

    assert said["refused"] == "c1"
    assert said["message"] == "its reconfigure(user_config) raised ValueError: no such config"
    assert 'raise ValueError("no such config")' in said["traceback"]
    assert await stage.handle.call() == "good"
    assert await stage.handle.history.call() == ["good", "bad", "good"]
    assert (await record_of(stage, redis, replica))["revision"] == ""


async def test_replica_that_cannot_go_back_takes_nothing_more_and_leaves(stage: Stage, redis: Control) -> None:
    way = Gate()
    replica = await stage.start(Model, None, way)  # it had no user_config

    await tell(replica, "c1", user_config="bad")
    await wait_until(lambda: way.inside == 1)
    late = await stage.submit(redis, *range(3), method="history")
    way.open()

    assert await replica.end() == 0
    assert [message["refused"] for message in replica.heard if "refused" in message] == ["c1"]
    assert await read_states(redis, stage.keys, late) == ["queued"] * 3
    await stage.drain()
    await redis.delete(stage.keys.config)
    await Registry(redis, stage.settings)._removal.finish([stage.keys])


async def test_user_config_without_a_method_for_it_is_refused(stage: Stage) -> None:
    class Plain:
        async def __call__(self) -> None: ...

    replica = await stage.start(Plain)

    await tell(replica, "c1", user_config=1)

    assert "Plain has no method reconfigure(user_config)" in (await replica.hears("refused"))["message"]


async def test_request_that_does_not_end_in_time_is_not_waited_for(stage: Stage) -> None:
    gate = Gate()
    replica = await stage.start(Model, gate, graceful_shutdown_timeout_s=0)
    running = stage.handle.held.call("x")
    await wait_until(lambda: gate.inside == 1)

    await tell(replica, "c1", user_config=1)

    assert await replica.hears("stuck") == {"stuck": "c1"}
    assert await stage.handle.call() is None  # it goes on, as it was
    gate.open()
    assert await running == "x"


@pytest.mark.parametrize("lost", [("reads",), ("writes",), ("reads", "writes")])
async def test_lost_connection_does_not_disturb_a_reconfiguration(
    stage: Stage, redis: Control, lost: tuple[str, ...]
) -> None:
    gate, way = Gate(), Gate()
    gate.open()
    replica = await stage.start(Model, gate, way)
    await tell(replica, "c1", user_config=1)
    await wait_until(lambda: way.inside == 1)

    await cut(redis, *[f"ms:{one}:{replica.name}" for one in lost])
    late = await stage.submit(redis, *range(3), method="held")
    await wait_until(lambda: sum("ready" in message for message in replica.heard) == 2)
    states = await read_states(redis, stage.keys, late)
    way.open()
    await settled(replica, "c1")

    assert states == ["queued"] * 3
    for ref in late:
        await wait_until(lambda ref=ref: _has_ended(stage, redis, ref))
    assert (await record_of(stage, redis, replica))["revision"] == "c1"


async def test_what_was_delivered_into_a_lost_connection_goes_back_while_it_is_reconfigured(
    stage: Stage, redis: Control
) -> None:
    way = Gate()
    replica = await stage.start(Model, None, way, name="r-ghost")
    await tell(replica, "c1", user_config=1)
    await wait_until(lambda: way.inside == 1)
    refs = await stage.submit(redis, *range(3), method="__call__")
    await redis.xreadgroup("replicas", "r-ghost", {stage.keys.lane("normal"): ">"})  # the reply that never arrived

    await cut(redis, "ms:reads:r-ghost")
    await wait_until(lambda: sum("ready" in message for message in replica.heard) == 2)

    assert await read_states(redis, stage.keys, refs) == ["queued"] * 3
    way.open()
    await settled(replica, "c1")


async def test_replica_drained_while_it_waits_gives_the_update_up(stage: Stage) -> None:
    gate = Gate()
    replica = await stage.start(Model, gate)
    running = stage.handle.held.call("x")
    await wait_until(lambda: gate.inside == 1)
    await tell(replica, "c1", user_config=1)
    await wait_until(lambda: is_paused(replica))

    draining = asyncio.create_task(replica.drain())
    gate.open()

    assert await draining == 0
    assert await running == "x"


async def test_replica_drained_while_it_reconfigures_does_that_to_the_end(stage: Stage) -> None:
    way = Gate()
    replica = await stage.start(Model, None, way)
    await tell(replica, "c1", user_config=1)
    await wait_until(lambda: way.inside == 1)

    draining = asyncio.create_task(replica.drain())
    await wait_until(lambda: replica.replica._intake is not None and replica.replica._intake.is_draining)
    way.open()

    assert await draining == 0
    assert way.passed == 1
