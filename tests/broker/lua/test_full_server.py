"""A server without memory takes no new requests; whatever makes room, and whatever proves life, goes on."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest

from millstream.broker import control_scripts, scripts
from millstream.broker.cluster import dial_everywhere
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys, Keys
from millstream.broker.records import NewDeployment, ReplicaRecord
from millstream.broker.registry import Registry
from millstream.broker.scripts import Ended, Supplied
from millstream.broker.states import State
from millstream.config import DeploymentConfig, Settings
from millstream.errors import BackPressureError, SignatureError
from tests.helpers import (
    BODY,
    CALLER,
    REPLICA,
    age,
    asking,
    cancel,
    claim,
    deploy_config,
    emit,
    finish,
    new_ref,
    read_state,
    read_states,
    request,
    seed_delayed,
    seed_parked,
    seed_queued,
    seed_running,
)

pytestmark = pytest.mark.anyio

A = "up.Up~" + "a" * 22
Fill = Callable[[], Awaitable[None]]


@pytest.fixture
async def fill(redis: Control) -> AsyncIterator[Fill]:
    """From when it is awaited, the server has no memory left."""

    async def fill() -> None:
        await redis.config_set("maxmemory", 1)

    yield fill
    await redis.config_set("maxmemory", 0)


async def test_submit_is_refused_and_says_so(
    redis: Control, settings: Settings, keys: DeploymentKeys, fill: Fill
) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()
    call = scripts.submit(keys, CALLER, request(ref))
    link = await dial_everywhere(settings, "test")
    await fill()

    with pytest.raises(BackPressureError, match="raise its maxmemory"):
        await link.run(call)
    with pytest.raises(BackPressureError, match="raise its maxmemory"):
        await run(redis, call)

    link.close()
    assert await read_state(redis, keys, ref) is None


async def test_hold_is_refused_and_says_so(redis: Control, keys: DeploymentKeys, fill: Fill) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()
    await fill()

    with pytest.raises(BackPressureError, match="raise its maxmemory"):
        await run(redis, scripts.hold(keys, CALLER, ref.encode(), "normal", b"m", BODY, depends_on=[A]))

    assert await read_state(redis, keys, ref) is None


async def test_deploy_is_refused_and_changes_nothing(
    redis: Control, settings: Settings, keys: DeploymentKeys, fill: Fill
) -> None:
    registry = Registry(redis, settings)
    await registry.deploy("app", "Model", [NewDeployment("Model", DeploymentConfig(num_replicas=1), b"", "code")])
    before = await registry.current("app.Model")
    await fill()

    with pytest.raises(BackPressureError, match="raise its maxmemory"):
        await registry.deploy("app", "Model", [NewDeployment("Model", DeploymentConfig(num_replicas=2), b"", "code")])

    assert await registry.current("app.Model") == before


async def test_config_is_taken_back_and_causes_are_noted_and_what_left_is_removed(
    redis: Control, settings: Settings, keys: DeploymentKeys, fill: Fill
) -> None:
    registry = Registry(redis, settings)
    both = [NewDeployment(name, DeploymentConfig(), b"", "code") for name in ("Model", "Other")]
    await registry.deploy("app", "Model", both)
    first = await registry.current("app.Model")
    second = await registry.deploy("app", "Model", both)
    assert first is not None
    former = ReplicaRecord("r-1", "n-1", 1, "former", "RUNNING", 0)
    await registry.client.hset(keys.replicas, "r-1", registry.signer.write(former, keys.tag, "r-1"))
    await registry.deploy("app", "Model", [NewDeployment("Model", DeploymentConfig(), b"", "code")])
    third = await registry.current("app.Model")
    assert third is not None and third.revision != second.version
    await redis.hdel(keys.replicas, "r-1")
    await fill()

    assert await registry.withdraw("app.Model", third.revision, first, "why", "") is control_scripts.Withdrawn.WITHDRAWN
    await registry.note_death("app.Model", "r-1", "killed")
    await registry.retire()

    assert (await registry.apps())["app"].leaving == {}
    assert await registry.current("app.Other") is None
    view = await registry.view("app", "Model")
    assert view is not None and view.last_death is not None and view.revision == first.revision


async def test_secret_is_compared_and_an_operator_is_obeyed(redis: Control, settings: Settings, fill: Fill) -> None:
    registry = Registry(redis, settings)
    await registry.check_secret()
    await registry.deploy("app", "Model", [NewDeployment("Model", DeploymentConfig(), b"", "code")])
    await fill()

    await registry.check_secret()
    with pytest.raises(SignatureError):
        await Registry(redis, replace(settings, secret_key=b"another")).check_secret()
    await registry.override("app.Model", {"num_replicas": 2})

    view = await registry.view("app", "Model")
    assert view is not None and view.override == {"num_replicas": 2}


async def test_new_namespace_is_refused_and_told_why(redis: Control, settings: Settings, fill: Fill) -> None:
    await fill()

    with pytest.raises(BackPressureError, match="raise its maxmemory"):
        await Registry(redis, settings).check_secret()


async def test_queued_requests_are_claimed_and_finished(redis: Control, keys: DeploymentKeys, fill: Fill) -> None:
    await deploy_config(redis, keys)
    (ref,) = await seed_queued(redis, keys)
    await fill()

    (one,) = await claim(redis, keys)
    await finish(redis, keys, one)

    assert await read_state(redis, keys, ref) == State.SUCCEEDED


async def test_requests_of_the_dead_are_released_and_buried(redis: Control, keys: DeploymentKeys, fill: Fill) -> None:
    await deploy_config(redis, keys, max_attempts=2)
    (one,) = await seed_running(redis, keys)
    await fill()

    first = await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=True))
    await claim(redis, keys)
    second = await run(redis, scripts.release(keys, "returned", REPLICA, "killed", expired=True))

    assert (first.requeued, second.buried) == (1, 1)
    assert await read_state(redis, keys, one.ref) == State.DEAD


async def test_requests_are_handed_back(redis: Control, keys: DeploymentKeys, fill: Fill) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await fill()

    assert await run(redis, scripts.hand_back(keys, "normal", "normal", [one.entry])) == 1


async def test_parked_requests_are_supplied_and_rejected(redis: Control, keys: DeploymentKeys, fill: Fill) -> None:
    await deploy_config(redis, keys)
    supplied, rejected = await seed_parked(redis, keys, A), await seed_parked(redis, keys, A)
    await fill()

    answer = await run(redis, scripts.supply(keys, supplied, A, b"value"))
    await run(redis, scripts.reject(keys, rejected, 60, b"error"))

    assert answer == Supplied.QUEUED
    assert await read_state(redis, keys, rejected) == State.FAILED


async def test_due_requests_are_queued(redis: Control, keys: DeploymentKeys, fill: Fill) -> None:
    await deploy_config(redis, keys)
    ref = await seed_delayed(redis, keys)
    await redis.zadd(keys.due, {ref: 1})
    await fill()

    assert (await run(redis, control_scripts.sweep(keys))).promoted == 1


async def test_due_requests_are_woken(redis: Control, keys: DeploymentKeys, fill: Fill) -> None:
    await deploy_config(redis, keys)
    ref = await seed_delayed(redis, keys)
    await age(redis, keys.due, ref)
    await fill()

    assert await run(redis, scripts.wake(keys)) == 1


async def test_requests_are_cancelled_expire_and_are_discarded(
    redis: Control, keys: DeploymentKeys, fill: Fill
) -> None:
    """Each makes room: a body for a line of text."""
    await deploy_config(redis, keys)
    cancelled, expired, discarded = await seed_queued(redis, keys, 3, extras=asking(timeout_ms=3_600_000))
    await age(redis, keys.deadlines, expired)
    await fill()

    answers = [await cancel(redis, keys, cancelled), await cancel(redis, keys, expired, overdue=True)]
    await run(redis, scripts.discard(keys, "0", 60, "deleted", running=True))

    assert answers == [[Ended.ENDED]] * 2
    assert await read_states(redis, keys, [cancelled, expired, discarded]) == [
        State.CANCELLED,
        State.TIMED_OUT,
        State.CANCELLED,
    ]


async def test_stream_goes_on_to_its_end(redis: Control, keys: DeploymentKeys, fill: Fill) -> None:
    """What may run ahead is bounded, and only the end of the request frees its arguments and its slot."""
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys, extras=asking(stream=4))
    await fill()

    emitted = await emit(redis, keys, one, 0, b"a", b"b")
    removed = await run(redis, scripts.consume(keys, one.ref, 2))
    await finish(redis, keys, one)

    assert (emitted, removed) == ((True, 0), 2)
    assert await read_state(redis, keys, one.ref) == State.SUCCEEDED


async def test_large_arguments_are_refused_where_they_are_written(
    redis: Control, settings: Settings, keys: DeploymentKeys, fill: Fill
) -> None:
    link = await dial_everywhere(settings, "test")
    await fill()

    with pytest.raises(BackPressureError, match="raise its maxmemory"):
        await link.ask("SET", keys.payload(new_ref()), b"x" * 100_000, "PX", 60_000)

    link.close()
    assert not await redis.keys()


async def test_large_value_that_was_written_in_time_is_kept_supplied_and_finished(
    redis: Control, keys: DeploymentKeys, fill: Fill
) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    waiter = await seed_parked(redis, keys, A)
    value = keys.value(one.ref, one.entry.decode())
    await redis.set(value, b"a large value", px=1000)
    await fill()

    refused, _ = await finish(redis, keys, one, value=b"@13")
    kept = await run(redis, scripts.keep([value]))
    supplied = await run(redis, scripts.supply(keys, waiter, A, b"succeeded normal 1-1\n@13", [value]))

    assert (refused, kept, supplied) == ({}, 1, Supplied.QUEUED)


async def test_refs_can_be_watched(redis: Control, keys: DeploymentKeys, fill: Fill) -> None:
    await deploy_config(redis, keys)
    (ref,) = await seed_queued(redis, keys)
    await fill()

    assert await run(redis, scripts.watch(keys, "readers", "anna", [ref])) == [b"open"]
    assert await redis.exists(keys.notes)


async def test_autoscaler_reads_and_decides_and_leases_are_renewed(
    redis: Control, keys: DeploymentKeys, fill: Fill
) -> None:
    await deploy_config(redis, keys)
    await seed_queued(redis, keys)
    await fill()

    assert (await run(redis, control_scripts.backlog(keys))).waiting == 1
    assert await run(redis, control_scripts.lead(Keys("ms"), "a-1", 10)) == 1
    assert await run(redis, control_scripts.decide(keys, 1, 3, "why", {})) == "decided"
    assert await run(redis, control_scripts.renew([keys.lease(REPLICA)], 10, "launcher")) == 1
