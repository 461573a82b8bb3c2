"""Requests that wait for others: wide, deep and tangled graphs, refs that have come to an end, and crashes in between."""

import asyncio
import re
from typing import Any

import anyio.to_thread
import pytest

import millstream
from millstream.broker import scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys, split_ref
from millstream.broker.registry import Registry
from millstream.broker.supplying import Supplier
from millstream.config import Settings
from millstream.errors import BackPressureError, RefNotFoundError, ReplicaDiedError, RequestCancelledError
from millstream.handles.ref import ObjectRef
from millstream.replicas.finisher import Finisher
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Serving

pytestmark = pytest.mark.anyio


class Model:
    """Adds, waits, fails, and notes what ran."""

    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate or Gate()
        self.ran = list[Any]()

    async def __call__(self, *numbers: int) -> int:
        return sum(numbers) + 1

    async def keep(self, *args: Any, **kwargs: Any) -> Any:
        self.ran.append((args, kwargs))
        return args, kwargs

    async def count(self) -> int:
        return len(self.ran)

    async def held(self, x: Any) -> Any:
        await self._gate.wait()
        return x

    async def blob(self, size: int) -> bytes:
        return b"x" * size

    async def fail(self) -> None:
        raise KeyError("origin")


def keys_of(ref: ObjectRef) -> tuple[DeploymentKeys, str]:
    tag, local = split_ref(ref.id)
    return DeploymentKeys("ms", tag), local


# shapes


async def test_fan_in_of_a_thousand(serving: Serving) -> None:
    handle = serving(Model, replicas=2)

    assert await handle.call(*[handle.remote(x) for x in range(1000)]) == sum(range(1, 1001)) + 1


async def test_fan_in_over_several_applications(serving: Serving) -> None:
    handles = [serving(Model) for _ in range(4)]

    assert await handles[0].call(*[handle.remote(x) for x in range(50) for handle in handles]) == 4 * 1275 + 1


async def test_chain_of_a_hundred_at_once(serving: Serving) -> None:
    handles = [serving(Model) for _ in range(3)]

    task = handles[0].remote(0)
    for depth in range(99):
        task = handles[depth % 3].remote(task)

    assert await (await task) == 100


async def test_many_chains_at_once(serving: Serving) -> None:
    first, second = serving(Model, replicas=2), serving(Model)
    calls = [second.call(first.remote(second.remote(first.remote(x)))) for x in range(200)]

    assert await asyncio.gather(*calls) == [x + 4 for x in range(200)]


async def test_same_ref_as_position_keyword_and_inside(serving: Serving) -> None:
    handle = serving(Model)
    task = handle.remote(1)
    ref = await task

    (args, kwargs) = await handle.keep.call(task, ref, [task], x=ref, y={"ref": task})

    assert (args, kwargs) == ((2, 2, [ref]), {"x": 2, "y": {"ref": ref}})


async def test_one_ref_for_a_hundred_dependants(serving: Serving) -> None:
    gate = Gate()
    handle = serving(Model, gate)
    top = handle.held.remote(1)
    calls = [handle.call(top, x) for x in range(100)]
    await wait_until(lambda: gate.inside == 1)

    gate.open()

    assert await asyncio.gather(*calls) == [x + 2 for x in range(100)]


@pytest.mark.parametrize("refs", [4000])
async def test_more_refs_than_a_request_can_wait_for_are_refused_with_a_way_out(
    serving: Serving, refs: int, connected: Settings
) -> None:
    handle = serving(Model)
    ref_ids = [f"app.Model~{x:022d}" for x in range(refs)]

    with pytest.raises(millstream.PayloadTooLargeError, match="3900 refs at most; pass the others inside a list"):
        await handle.remote(*[ObjectRef.from_id(ref_id) for ref_id in ref_ids])


# refs that have come to an end, or never were


@pytest.mark.parametrize("position", ["argument", "keyword"])
async def test_unknown_ref_fails_its_dependant_and_what_depends_on_that(serving: Serving, position: str) -> None:
    handle = serving(Model)
    unknown = ObjectRef.from_id(f"{handle.app_name}.Model~" + "u" * 22)

    args, kwargs = ((unknown,), {}) if position == "argument" else ((), {"x": unknown})
    with pytest.raises(RefNotFoundError, match=re.escape(unknown.id)):
        await asyncio.wait_for(handle.call(handle.keep.remote(*args, **kwargs)), 5)
    with pytest.raises(RefNotFoundError, match=re.escape("gone.Deployment~")):
        await asyncio.wait_for(handle.call(ObjectRef.from_id("gone.Deployment~" + "u" * 22)), 5)


async def test_ref_whose_result_has_expired_fails_its_dependant(serving: Serving, redis: Control) -> None:
    handle = serving(Model)
    ref = await handle.remote(1)
    await ref
    keys, local = keys_of(ref)
    await redis.pexpire(keys.result(local), 1)
    await wait_until(lambda: _is_gone(redis, keys.result(local)))

    with pytest.raises(RefNotFoundError, match=re.escape(ref.id)):
        await asyncio.wait_for(handle.call(ref), 5)


async def _is_gone(redis: Control, key: str) -> bool:
    return not await redis.exists(key)


async def test_cancelled_task_fails_its_dependant_as_cancelled(serving: Serving) -> None:
    handle, nobody = serving(Model), serving.deploy_only(Model)
    task = nobody.remote(1)
    dependant = await handle.remote(task)

    task.cancel()  # before it is matched: as in Ray, that takes the request back

    with pytest.raises(RequestCancelledError):
        await asyncio.wait_for(dependant, 5)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_cancelled_ref_fails_its_dependant_as_cancelled(serving: Serving, when: str) -> None:
    gate = Gate()
    handle = serving(Model, gate)
    ref = await handle.held.remote(1)
    if when == "before":
        await ref.acancel()
    dependant = await handle.remote(handle.remote(ref))
    if when == "meanwhile":
        await ref.acancel()

    with pytest.raises(RequestCancelledError) as caught:
        await asyncio.wait_for(dependant, 5)
    assert caught.value.ref_id == ref.id
    gate.open()


async def test_deleting_a_deployment_fails_what_depends_on_its_requests(
    serving: Serving, connected: Settings, redis: Control
) -> None:
    handle, going = serving(Model), serving.deploy_only(Model)
    dependant = await handle.remote(handle.remote(going.remote(1)))

    await Registry(redis, connected).delete(going.app_name)

    with pytest.raises(RequestCancelledError, match=f"deployment {going.app_name}.Model was deleted"):
        await asyncio.wait_for(dependant, 5)


async def test_dead_letter_fails_its_dependant_as_dead(serving: Serving, connected: Settings, redis: Control) -> None:
    handle = serving(Model)
    stuck = serving.deploy_only(Model)
    ref = await stuck.options(block_until="queued", max_attempts=1).remote(1)
    dependant = await handle.remote(ref)
    keys, _ = keys_of(ref)
    await run(redis, scripts.claim(keys, "r-dead", 1))
    released = await run(redis, scripts.release(keys, "normal", "r-dead", "killed", expired=False))
    await Supplier(connected, lambda call: run(redis, call)).supply_all(keys.tag, released.waiters)

    with pytest.raises(ReplicaDiedError) as caught:
        await asyncio.wait_for(dependant, 5)
    assert caught.value.ref_id == ref.id


async def test_ref_that_ended_long_ago_is_as_good_as_any(serving: Serving) -> None:
    handle = serving(Model)
    ref = await handle.remote(1)
    assert await ref == 2

    assert await asyncio.gather(*[handle.call(ref, x) for x in range(20)]) == [3 + x for x in range(20)]
    with pytest.raises(KeyError, match="origin"):
        await handle.call(await handle.fail.remote())


async def test_ref_by_id_of_a_running_request_is_an_argument(serving: Serving) -> None:
    gate = Gate()
    handle = serving(Model, gate)
    ref = await handle.held.remote(1)
    again = ObjectRef.from_id(ref.id)
    del ref

    dependant = await handle.remote(again)
    gate.open()

    assert await dependant == 2


async def test_refs_of_two_loops_meet_in_one_request(serving: Serving) -> None:
    handle = serving(Model)

    async def elsewhere() -> ObjectRef:
        return await handle.remote(10)

    there = await anyio.to_thread.run_sync(asyncio.run, elsewhere())
    of_threads = await anyio.to_thread.run_sync(
        millstream.SyncHandle(handle.deployment_name, handle.app_name).remote, 20
    )

    assert await handle.call(handle.remote(1), there, of_threads) == 2 + 11 + 21 + 1


# a full queue


async def test_dependant_of_a_request_that_waits_for_room_waits_with_it(serving: Serving) -> None:
    gate = Gate()
    handle = serving(Model)
    full = serving(Model, gate, max_queued_requests=1, max_ongoing_requests=1)
    running = await full.held.remote(0)
    queued = await full.options(block_until="queued").held.remote(0)

    patient = full.options(when_full="wait").remote(1)
    dependant = handle.call(patient)
    nested = handle.keep.call([patient])
    await asyncio.sleep(0.1)
    gate.open()

    assert await asyncio.wait_for(dependant, 5) == 3
    (((inner,),), _) = await asyncio.wait_for(nested, 5)
    assert await inner == 2
    assert [await running, await queued] == [0, 0]


async def test_dependant_of_a_request_that_finds_no_room_fails_with_it(serving: Serving) -> None:
    gate = Gate()
    handle = serving(Model)
    full = serving(Model, gate, max_queued_requests=1, max_ongoing_requests=1)
    await full.held.remote(0)
    await full.options(block_until="queued").held.remote(0)

    with pytest.raises(BackPressureError):
        await asyncio.wait_for(handle.call(full.remote(1)), 5)
    gate.open()


# crashes in between


def supply_nobody(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """From now on replicas "die" between finish and supply; whom they did not supply."""
    unsupplied: list[Any] = []

    async def die(_: Finisher, lane: str, batch: list[Any], waiters: list[Any]) -> None:
        unsupplied.append(waiters)

    monkeypatch.setattr(Finisher, "_supply", die)
    return unsupplied


async def test_replica_that_dies_between_finish_and_supply_is_made_up_for_once(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    handle = serving(Model, gate)
    upstream = handle.held.remote(1)
    dependants = [await handle.keep.remote(upstream, x) for x in range(3)]

    unsupplied = supply_nobody(monkeypatch)
    gate.open()
    assert await (await upstream) == 1
    await wait_until(lambda: len(unsupplied) == 1)
    assert [await one.astatus() for one in dependants] == ["parked"] * 3
    monkeypatch.undo()

    values = await asyncio.wait_for(asyncio.gather(*dependants), 10)  # the sweepers of the replicas find them

    assert values == [((1, x), {}) for x in range(3)]
    assert await handle.count.call() == 3


@pytest.mark.parametrize("size", [10, 200_000])
async def test_result_that_a_queued_request_depends_on_does_not_expire_before_it_runs(
    serving: Serving, redis: Control, size: int
) -> None:
    upstream = serving(Model, result_ttl_s=1)
    downstream = serving.deploy_only(Model)
    ref = await upstream.blob.remote(size)
    await wait_until(lambda: _has_state(ref, "succeeded"))  # nobody waits for it yet: it gets its own TTL
    dependant = await downstream.options(block_until="queued").keep.remote(ref)
    await wait_until(lambda: _has_state(dependant, "queued"))
    keys, local = keys_of(ref)
    await wait_until(lambda: _is_gone(redis, keys.result(local)))

    serving.start_replica(downstream, Model)

    ((value,), _) = await asyncio.wait_for(dependant, 5)
    assert value == b"x" * size


async def _has_state(ref: ObjectRef, state: str) -> bool:
    return await ref.astatus() == state


@pytest.mark.parametrize("size", [10, 200_000])
async def test_result_outlives_its_ttl_until_a_sweeper_has_supplied_it(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    gate = Gate()

    async def blob() -> bytes:
        await gate.wait()
        return b"x" * size

    upstream = serving(blob, result_ttl_s=1)
    downstream = serving(Model)
    ref = await upstream.remote()
    dependant = await downstream.keep.remote(ref)

    unsupplied = supply_nobody(monkeypatch)
    gate.open()
    await wait_until(lambda: len(unsupplied) == 1)
    monkeypatch.undo()
    await asyncio.sleep(1.1)  # more than its TTL, less than a sweeper waits before it looks

    ((value,), _) = await asyncio.wait_for(dependant, 10)
    assert value == b"x" * size
