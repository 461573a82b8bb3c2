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
from millstream.errors import (
    RefNotFoundError,
    ReplicaDiedError,
    RequestCancelledError,
    RequestTimeoutError,
    TaskError,
)
from tests.helpers import (
    REPLICA,
    age,
    asking,
    cancel,
    claim,
    deploy_config,
    finish,
    new_ref,
    read_state,
    seed_parked,
    seed_running,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake, pytest.mark.on_cluster]

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


@pytest.mark.parametrize(("overdue", "error_class"), [(False, RequestCancelledError), (True, RequestTimeoutError)])
async def test_end_from_outside_fails_all_that_depend_on_it(
    redis: Control,
    settings: Settings,
    keys: DeploymentKeys,
    supplier: Supplier,
    overdue: bool,
    error_class: type[Exception],
) -> None:
    await deploy_config(redis, keys)
    await deploy_config(redis, DOWN)
    (upstream,) = await seed_running(redis, keys, extras=asking(timeout_ms=0))
    ends = [
        (keys, await seed_parked(redis, keys, f"app.Model~{upstream.ref}")),
        (DOWN, await seed_parked(redis, DOWN, f"app.Model~{upstream.ref}")),
    ]
    for where, end in ends:
        await supplier.watch(f"{where.tag}~{end}", f"app.Model~{upstream.ref}")

    call = scripts.cancel(keys, 60, "nobody wants it", [upstream.ref], overdue=overdue)
    _, waiters = await run(redis, call)
    await supplier.supply_all(keys.tag, waiters)

    errors = [await outcome_of(redis, settings, where, end) for where, end in ends]
    assert [type(error) for error in errors] == [error_class] * 2
    assert [error.ref_id for error in errors] == [f"app.Model~{upstream.ref}"] * 2


# large values


LARGE = 3_600_000


async def seed_large(redis: Control, keys: DeploymentKeys) -> tuple[str, str]:
    """A request that ended with a large value: its ref id, and the key of the value."""
    (upstream,) = await seed_running(redis, keys)
    key = keys.value(upstream.ref, upstream.entry.decode())
    await redis.set(key, b"a large envelope", px=60_000)
    assert await finish(redis, keys, upstream, value=b"@16") == ({}, [])
    return f"{keys.tag}~{upstream.ref}", key


async def test_large_value_stays_where_it_is_and_is_held_for_the_dependant(
    redis: Control, settings: Settings, keys: DeploymentKeys, supplier: Supplier
) -> None:
    await deploy_config(redis, keys)
    await deploy_config(redis, DOWN)
    upstream_id, key = await seed_large(redis, keys)
    waiter = await seed_parked(redis, DOWN, upstream_id)

    await supplier.watch(f"app.Down~{waiter}", upstream_id)

    (one,) = await claim(redis, DOWN)
    assert one.fields[f"dep:{upstream_id}".encode()].endswith(b"\n@16")
    assert LARGE - 60_000 < await redis.pttl(key) <= LARGE
    noted: Any = await redis.hget(DOWN.holds, waiter)
    assert noted.decode().split()[1:] == [key]


async def test_large_value_that_was_put_is_held_too(redis: Control, keys: DeploymentKeys, supplier: Supplier) -> None:
    await deploy_config(redis, keys)
    put, ref = DeploymentKeys("ms", "put.07"), new_ref()
    await redis.set(put.value(ref, "-"), b"a large envelope", px=60_000)
    await redis.set(put.result(ref), b"succeeded - -\n@16", px=60_000)
    waiter = await seed_parked(redis, keys, f"put.07~{ref}")

    await supplier.watch(f"app.Model~{waiter}", f"put.07~{ref}")

    assert await read_state(redis, keys, waiter) == State.QUEUED
    assert await redis.pttl(put.value(ref, "-")) > 60_000


async def test_large_value_that_has_expired_fails_the_dependant_and_says_which(
    redis: Control, settings: Settings, keys: DeploymentKeys, supplier: Supplier
) -> None:
    await deploy_config(redis, keys)
    upstream_id, key = await seed_large(redis, keys)
    await redis.delete(key)
    waiter = await seed_parked(redis, keys, upstream_id)

    await supplier.watch(f"app.Model~{waiter}", upstream_id)

    error = await outcome_of(redis, settings, keys, waiter)
    assert isinstance(error, RefNotFoundError) and error.ref_id == upstream_id


async def test_supplier_that_died_before_it_supplied_did_no_harm(
    redis: Control, settings: Settings, keys: DeploymentKeys, supplier: Supplier
) -> None:
    await deploy_config(redis, keys)
    upstream_id, key = await seed_large(redis, keys)
    waiter = await seed_parked(redis, keys, upstream_id)
    await run(redis, scripts.keep([key]))  # and dies

    for _ in range(2):
        await supplier.supply(upstream_id, [f"app.Model~{waiter}"])

    assert await read_state(redis, keys, waiter) == State.QUEUED
    assert await redis.hlen(keys.holds) == 1


# twice, and after crashes


async def test_supplying_twice_is_as_once(
    redis: Control, settings: Settings, keys: DeploymentKeys, supplier: Supplier
) -> None:
    await deploy_config(redis, keys)
    (upstream,) = await seed_running(redis, keys)
    waiter = await seed_parked(redis, keys, f"app.Model~{upstream.ref}", "up.Up~" + "u" * 22)
    await finish(redis, keys, upstream, value=sealed(settings, keys, upstream.ref, 42))

    for _ in range(2):
        await supplier.supply(f"app.Model~{upstream.ref}", [f"app.Model~{waiter}"])

    assert await redis.hget(keys.supplied(waiter), "missing") == b"1"


async def test_what_has_not_ended_supplies_nothing(redis: Control, keys: DeploymentKeys, supplier: Supplier) -> None:
    await deploy_config(redis, keys)
    (upstream,) = await seed_running(redis, keys)
    waiter = await seed_parked(redis, keys, f"app.Model~{upstream.ref}")

    await supplier.supply(f"app.Model~{upstream.ref}", [f"app.Model~{waiter}"])

    assert await read_state(redis, keys, waiter) == State.PARKED


async def test_sweeper_tells_dependants_of_a_cancellation_whose_author_died(
    redis: Control, settings: Settings, keys: DeploymentKeys, supplier: Supplier
) -> None:
    await deploy_config(redis, keys)
    (upstream,) = await seed_running(redis, keys)
    waiter = await seed_parked(redis, keys, f"app.Model~{upstream.ref}")
    await supplier.watch(f"app.Model~{waiter}", f"app.Model~{upstream.ref}")
    await cancel(redis, keys, upstream.ref)  # and dies
    await age(redis, keys.parked, waiter)

    await Sweeper(settings, lambda call: run(redis, call), redis.execute_command).step("app.Model")

    assert isinstance(await outcome_of(redis, settings, keys, waiter), RequestCancelledError)


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
