"""Outcomes on their way to the requests that wait for them, over several deployments and after crashes."""

from typing import Any

import pytest

from millstream.broker import outcomes, pickling, remote_errors, scripts
from millstream.broker.codec import codec_for
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.states import State
from millstream.broker.supplying import Supplier
from millstream.broker.sweeper import Sweeper
from millstream.config import Settings
from millstream.errors import RefNotFoundError, ReplicaDiedError, TaskError
from tests.helpers import (
    REPLICA,
    claim,
    deploy_config,
    finish,
    new_ref,
    read_state,
    seed_parked,
    seed_running,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]

DOWN = DeploymentKeys("ms", "app.Down")


@pytest.fixture
def supplier(redis: Control, settings: Settings) -> Supplier:
    return Supplier(settings, lambda call: run(redis, call))


def sealed(settings: Settings, keys: DeploymentKeys, ref: str, value: Any) -> bytes:
    codec = codec_for(settings.secret_key, "ms", keys.tag)
    if isinstance(value, BaseException):
        return codec.seal("error", ref.encode(), remote_errors.capture(value))
    return codec.seal("value", ref.encode(), pickling.dump(value, what="value"))


async def outcome_of(redis: Control, settings: Settings, keys: DeploymentKeys, ref: str) -> Any:
    """The value or error that a caller of this request would get."""
    stored: Any = await redis.get(keys.result(ref))
    try:
        return outcomes.open_stored(codec_for(settings.secret_key, "ms", keys.tag), ref.encode(), stored)
    except Exception as e:
        return e


async def test_value_reaches_the_waiter_that_was_noted(
    redis: Control, settings: Settings, keys: DeploymentKeys, supplier: Supplier
) -> None:
    await deploy_config(redis, keys)
    await deploy_config(redis, DOWN)
    (upstream,) = await seed_running(redis, keys)
    waiter = await seed_parked(redis, DOWN, f"app.Model~{upstream.ref}")
    await supplier.watch(f"app.Down~{waiter}", f"app.Model~{upstream.ref}")
    value = sealed(settings, keys, upstream.ref, 42)

    _, waiters = await finish(redis, keys, upstream, value=value)
    await supplier.supply(f"app.Model~{upstream.ref}", [one.waiter_id for one in waiters])

    (one,) = await claim(redis, DOWN)
    assert one.fields[f"dep:app.Model~{upstream.ref}".encode()] == b"succeeded normal " + upstream.entry + b"\n" + value


async def test_value_that_is_there_already_is_supplied_at_once(
    redis: Control, settings: Settings, keys: DeploymentKeys, supplier: Supplier
) -> None:
    await deploy_config(redis, keys)
    (upstream,) = await seed_running(redis, keys)
    await finish(redis, keys, upstream, value=sealed(settings, keys, upstream.ref, 42))
    waiter = await seed_parked(redis, keys, f"app.Model~{upstream.ref}")

    await supplier.watch(f"app.Model~{waiter}", f"app.Model~{upstream.ref}")

    assert await read_state(redis, keys, waiter) == State.QUEUED


async def test_waiter_for_an_unknown_ref_fails_and_says_which(
    redis: Control, settings: Settings, keys: DeploymentKeys, supplier: Supplier
) -> None:
    await deploy_config(redis, keys)
    unknown = f"app.Model~{new_ref()}"
    waiter = await seed_parked(redis, keys, unknown)

    await supplier.watch(f"app.Model~{waiter}", unknown)

    error = await outcome_of(redis, settings, keys, waiter)
    assert isinstance(error, RefNotFoundError) and error.ref_id == unknown


async def test_failure_reaches_all_that_depend_on_it_with_the_original_error(
    redis: Control, settings: Settings, keys: DeploymentKeys, supplier: Supplier
) -> None:
    await deploy_config(redis, keys)
    await deploy_config(redis, DOWN)
    (upstream,) = await seed_running(redis, keys)
    middle = await seed_parked(redis, DOWN, f"app.Model~{upstream.ref}")
    ends = [await seed_parked(redis, keys, f"app.Down~{middle}") for _ in range(2)]
    await supplier.watch(f"app.Down~{middle}", f"app.Model~{upstream.ref}")
    for end in ends:
        await supplier.watch(f"app.Model~{end}", f"app.Down~{middle}")
    error = sealed(settings, keys, upstream.ref, ValueError("bad input"))

    _, waiters = await finish(redis, keys, upstream, state="failed", value=error)
    await supplier.supply(f"app.Model~{upstream.ref}", [one.waiter_id for one in waiters])

    caught = [await outcome_of(redis, settings, DOWN, middle)]
    caught += [await outcome_of(redis, settings, keys, end) for end in ends]
    assert [isinstance(one, ValueError) and isinstance(one, TaskError) for one in caught] == [True] * 3
    assert all("bad input" in str(one) for one in caught)


async def test_death_upstream_fails_the_waiter_with_it(
    redis: Control, settings: Settings, keys: DeploymentKeys, supplier: Supplier
) -> None:
    await deploy_config(redis, keys, max_attempts=1)
    (upstream,) = await seed_running(redis, keys)
    waiter = await seed_parked(redis, keys, f"app.Model~{upstream.ref}")
    await supplier.watch(f"app.Model~{waiter}", f"app.Model~{upstream.ref}")

    released = await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))
    await supplier.supply(f"app.Model~{upstream.ref}", [one.waiter_id for one in released.waiters])

    error = await outcome_of(redis, settings, keys, waiter)
    assert isinstance(error, ReplicaDiedError) and error.ref_id == f"app.Model~{upstream.ref}"


async def test_supplying_twice_is_as_once(
    redis: Control, settings: Settings, keys: DeploymentKeys, supplier: Supplier
) -> None:
    await deploy_config(redis, keys)
    (upstream,) = await seed_running(redis, keys)
    waiter = await seed_parked(redis, keys, f"app.Model~{upstream.ref}", "up.Up~" + "u" * 22)
    await finish(redis, keys, upstream, value=sealed(settings, keys, upstream.ref, 42))

    for _ in range(2):
        await supplier.supply(f"app.Model~{upstream.ref}", [f"app.Model~{waiter}"])

    assert await redis.hget(keys.held(waiter), "missing") == b"1"


async def test_what_has_not_ended_supplies_nothing(redis: Control, keys: DeploymentKeys, supplier: Supplier) -> None:
    await deploy_config(redis, keys)
    (upstream,) = await seed_running(redis, keys)
    waiter = await seed_parked(redis, keys, f"app.Model~{upstream.ref}")

    await supplier.supply(f"app.Model~{upstream.ref}", [f"app.Model~{waiter}"])

    assert await read_state(redis, keys, waiter) == State.PARKED


async def test_sweeper_supplies_what_a_crash_left_undone(
    redis: Control, settings: Settings, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    (upstream,) = await seed_running(redis, keys)
    waiter = await seed_parked(redis, keys, f"app.Model~{upstream.ref}")  # its submitter died before it could watch
    await finish(redis, keys, upstream, value=sealed(settings, keys, upstream.ref, 42))
    await redis.zadd(keys.parked, {waiter: 1})

    await Sweeper(settings, lambda call: run(redis, call), redis.execute_command).step("app.Model")

    assert await read_state(redis, keys, waiter) == State.QUEUED
