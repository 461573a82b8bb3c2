"""hold.lua, supply.lua and reject.lua: requests that wait for values or for their time, beside the lanes."""

import pytest
from redis.exceptions import ResponseError

from millstream.broker import control_scripts, scripts
from millstream.broker.call import Call
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.scripts import Submitted, Supplied, Waiter
from millstream.broker.states import State
from millstream.errors import PayloadTooLargeError
from tests.helpers import (
    BODY,
    CALLER,
    claim,
    deploy_config,
    finish,
    new_ref,
    open_inbox,
    read_everything,
    read_held,
    read_result,
    read_state,
    seed_delayed,
    seed_parked,
    seed_running,
    set_due,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]

A, B = "up.A~" + "a" * 22, "up.B~" + "b" * 22
VALUE = b"succeeded normal 1-1\nvalue"


def hold(keys: DeploymentKeys, ref: str, *depends_on: str, delay_ms: int = 0) -> Call[Submitted]:
    return scripts.hold(keys, CALLER, ref.encode(), "low", b"embed", BODY, delay_ms=delay_ms, depends_on=depends_on)


async def supply(redis: Control, keys: DeploymentKeys, ref: str, value_id: str, value: bytes = VALUE) -> Supplied:
    return await run(redis, scripts.supply(keys, ref, value_id, value))


# hold


@pytest.mark.parametrize(("depends_on", "delay_ms"), [((A,), 0), ((), 1000), ((A,), 1000)])
async def test_repeated_hold_is_told_open_and_changes_nothing(
    redis: Control, keys: DeploymentKeys, depends_on: tuple[str, ...], delay_ms: int
) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()
    first = await run(redis, hold(keys, ref, *depends_on, delay_ms=delay_ms))
    before = await read_everything(redis)

    second = await run(redis, hold(keys, ref, *depends_on, delay_ms=delay_ms))

    assert (first, second) == (Submitted.NEW, Submitted.OPEN)
    assert await read_everything(redis) == before


async def test_hold_repeated_after_the_end_is_told_done(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await finish(redis, keys, one)

    assert await run(redis, hold(keys, one.ref, A)) == Submitted.DONE
    assert await read_state(redis, keys, one.ref) == State.SUCCEEDED


async def test_hold_without_deployment_writes_nothing(redis: Control, keys: DeploymentKeys) -> None:
    with pytest.raises(ResponseError, match="NODEPLOYMENT"):
        await run(redis, hold(keys, new_ref(), A))

    assert await read_everything(redis) == {}


async def test_held_requests_take_no_place_in_a_lane(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await seed_parked(redis, keys, A)
    await seed_delayed(redis, keys)

    assert await claim(redis, keys, 5) == []
    assert (await run(redis, control_scripts.backlog(keys))).waiting == 0


# supply


async def test_last_value_queues_the_request_with_all_of_them(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()
    await run(redis, hold(keys, ref, A, B))

    answers = [await supply(redis, keys, ref, A, b"of a"), await supply(redis, keys, ref, B, b"of b")]

    (one,) = await claim(redis, keys)
    assert answers == [Supplied.PARKED, Supplied.QUEUED]
    assert one.lane == "low"
    assert one.fields == {
        b"ref": ref.encode(), b"method": b"embed", b"reply": CALLER.encode(), b"body": BODY,
        b"dep:" + A.encode(): b"of a", b"dep:" + B.encode(): b"of b",
    }  # fmt: skip


async def test_repeated_supply_counts_once_and_keeps_the_first_value(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = await seed_parked(redis, keys, A, B)
    await supply(redis, keys, ref, A, b"first")

    answer = await supply(redis, keys, ref, A, b"second")

    assert answer == Supplied.GONE
    assert await read_state(redis, keys, ref) == State.PARKED
    assert await redis.hget(keys.supplied(ref), f"dep:{A}") == b"first"


async def test_supply_repeated_after_the_promotion_changes_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = await seed_parked(redis, keys, A)
    await supply(redis, keys, ref, A)
    before = await read_everything(redis)

    assert await supply(redis, keys, ref, A) == Supplied.GONE
    assert await read_everything(redis) == before


async def test_value_nobody_waits_for_is_refused(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = await seed_parked(redis, keys, A)
    before = await read_everything(redis)

    assert await supply(redis, keys, ref, B) == Supplied.GONE
    assert await supply(redis, keys, new_ref(), A) == Supplied.GONE
    assert await read_everything(redis) == before


async def test_same_ref_twice_among_the_arguments_is_supplied_once(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()
    await run(redis, hold(keys, ref, A, B, A))

    await supply(redis, keys, ref, A)

    assert await supply(redis, keys, ref, B) == Supplied.QUEUED


async def test_request_may_wait_for_a_thousand_values(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()
    upstream = [f"up.Up~{number:022d}" for number in range(1000)]
    await run(redis, hold(keys, ref, *upstream))

    answers = [await supply(redis, keys, ref, value_id) for value_id in upstream]

    (one,) = await claim(redis, keys)
    assert answers == [Supplied.PARKED] * 999 + [Supplied.QUEUED]
    assert sum(name.startswith(b"dep:") for name in one.fields) == 1000


async def test_request_with_the_most_refs_it_may_wait_for_is_queued(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref, upstream = new_ref(), [f"up.Up~{number:022d}" for number in range(3900)]
    await run(redis, hold(keys, ref, *upstream))
    await redis.hset(
        keys.supplied(ref), mapping={"missing": 1, **{f"dep:{value_id}": "v" for value_id in upstream[1:]}}
    )

    assert await supply(redis, keys, ref, upstream[0]) == Supplied.QUEUED


async def test_request_with_more_refs_is_refused_and_writes_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    before = await read_everything(redis)

    with pytest.raises(PayloadTooLargeError, match="3900 refs"):
        await run(redis, hold(keys, new_ref(), *(f"up.Up~{number:022d}" for number in range(3901))))

    assert await read_everything(redis) == before


@pytest.mark.parametrize("ref_id", ["-", "*", "", "a b~c", "up.A", "up.A~a\nb"])
async def test_what_is_no_ref_id_is_refused_and_writes_nothing(
    redis: Control, keys: DeploymentKeys, ref_id: str
) -> None:
    await deploy_config(redis, keys)
    before = await read_everything(redis)

    with pytest.raises(ResponseError, match="BADREQUEST no ref id"):
        await run(redis, hold(keys, new_ref(), A, ref_id))

    assert await read_everything(redis) == before


async def test_delayed_request_that_also_waits_is_delayed_once_it_has_its_values(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    ref = await seed_parked(redis, keys, A, delay_ms=3_600_000)

    answer = await supply(redis, keys, ref, A)

    assert answer == Supplied.DELAYED
    assert await read_state(redis, keys, ref) == State.DELAYED
    assert await redis.zscore(keys.due, ref) == float((await read_held(redis, keys, ref)).due_ms)


async def test_delayed_request_whose_time_has_come_is_queued_by_its_last_value(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    ref = await seed_parked(redis, keys, A, delay_ms=3_600_000)
    await set_due(redis, keys, ref, 1)

    assert await supply(redis, keys, ref, A) == Supplied.QUEUED
    (one,) = await claim(redis, keys)
    assert b"due_ms" not in one.fields


# reject


async def test_rejected_request_fails_with_the_error_and_its_caller_is_told(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    ref = await seed_parked(redis, keys, A, B)
    await supply(redis, keys, ref, A)
    async with open_inbox(redis, keys, CALLER) as inbox:
        await run(redis, scripts.reject(keys, ref, 7, b"\x01p\nerror"))

        assert await inbox.take() == {ref: b"failed - -\n\x01p\nerror"}
    assert await read_result(redis, keys, ref) == ("failed - -", b"\x01p\nerror")
    assert 0 < await redis.pttl(keys.result(ref)) <= 7000
    assert not await redis.exists(keys.held, keys.supplied(ref), keys.parked, keys.open)


async def test_repeated_reject_changes_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = await seed_parked(redis, keys, A)
    await run(redis, scripts.reject(keys, ref, 60, b"error"))
    before = await read_everything(redis)

    assert await run(redis, scripts.reject(keys, ref, 60, b"another error")) == []
    assert await read_everything(redis) == before


async def test_rejection_cascades_over_the_waiters_it_reports(redis: Control, keys: DeploymentKeys) -> None:
    other = DeploymentKeys("ms", "app.Other")
    await deploy_config(redis, keys)
    await deploy_config(redis, other)
    b = await seed_parked(redis, keys, A)
    c, d = await seed_parked(redis, other, f"app.Model~{b}"), await seed_parked(redis, keys, f"app.Model~{b}")
    for waiter in (f"app.Other~{c}", f"app.Model~{d}"):
        await run(redis, scripts.watch(keys, "waiters", waiter, [b]))

    waiters = await run(redis, scripts.reject(keys, b, 60, b"error"))

    assert waiters == [Waiter(b.encode(), f"app.Other~{c}"), Waiter(b.encode(), f"app.Model~{d}")]
    assert await run(redis, scripts.reject(other, c, 60, b"error")) == []
    assert await read_state(redis, other, c) == State.FAILED
