"""cancel.lua and discard.lua, with taking.lua: open requests are ended from outside, and whoever runs them is told."""

from typing import Any

import pytest

from millstream.broker import control_scripts, scripts
from millstream.broker.call import Call
from millstream.broker.connection import Control, run
from millstream.broker.keys import GROUP, DeploymentKeys
from millstream.broker.link import REFUSED
from millstream.broker.scripts import Ended, Finished, Submitted, Supplied, Waiter
from millstream.broker.states import State
from tests.helpers import (
    REPLICA,
    asking,
    cancel,
    claim,
    deploy_config,
    finish,
    new_ref,
    open_inbox,
    open_orders,
    read_everything,
    read_result,
    read_state,
    read_states,
    request,
    seed_delayed,
    seed_parked,
    seed_queued,
    seed_running,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]

A = "up.A~" + "a" * 22


async def discard(redis: Control, keys: DeploymentKeys, *, running: bool) -> list[Waiter]:
    """All steps of the scan."""
    cursor, waiters, is_through = "0", list[Waiter](), False
    while not is_through:
        cursor, found = await run(redis, scripts.discard(keys, cursor, 60, "deleted", running=running))
        waiters += found
        is_through = cursor == "0"
    return waiters


# what is left


@pytest.mark.parametrize("lane", ["returned", "high", "normal", "low"])
@pytest.mark.parametrize("is_running", [True, False])
async def test_result_says_where_it_was_and_why_and_the_entry_is_gone(
    redis: Control, keys: DeploymentKeys, lane: str, is_running: bool
) -> None:
    await deploy_config(redis, keys)
    (ref,) = await seed_queued(redis, keys, lane=lane)
    place: Any = await redis.hget(keys.open, ref)
    if is_running:
        await claim(redis, keys)

    answers, _ = await run(redis, scripts.cancel(keys, 7, "nobody wants it", [ref]))

    assert answers == [(Ended.ENDED, 0)]
    assert await read_result(redis, keys, ref) == (f"cancelled {place.decode()}", b"nobody wants it")
    assert 0 < await redis.pttl(keys.result(ref)) <= 7000
    assert await redis.xlen(keys.lane(lane)) == 0
    assert (await redis.xpending(keys.lane(lane), GROUP))["pending"] == 0


@pytest.mark.parametrize("how", ["parked", "delayed"])
async def test_held_request_leaves_nothing_but_its_result(redis: Control, keys: DeploymentKeys, how: str) -> None:
    await deploy_config(redis, keys)
    seed = seed_parked if how == "parked" else seed_delayed
    ref = await seed(redis, keys, extras=asking(timeout_ms=60_000))

    await cancel(redis, keys, ref)

    assert await read_result(redis, keys, ref) == ("cancelled - -", b"why not")
    assert not await redis.exists(keys.open, keys.parked, keys.due, keys.deadlines, keys.notes, keys.held)


async def test_answers_come_in_the_order_of_the_refs(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (done,) = await seed_running(redis, keys)
    await finish(redis, keys, done)
    (running,) = await seed_running(redis, keys)
    (queued,) = await seed_queued(redis, keys)
    parked = await seed_parked(redis, keys)

    answers = await cancel(redis, keys, done.ref, running.ref, new_ref(), parked, queued)

    assert answers == [Ended.GONE, Ended.ENDED, Ended.GONE, Ended.ENDED, Ended.ENDED]
    states = await read_states(redis, keys, [done.ref, running.ref, parked, queued])
    assert states == [State.SUCCEEDED, *[State.CANCELLED] * 3]


async def test_others_stay_and_the_backlog_stays_exact(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    running = await seed_running(redis, keys, 4)
    queued = await seed_queued(redis, keys, 4)

    await cancel(redis, keys, running[1].ref, running[2].ref, queued[1], queued[2])

    backlog = await run(redis, control_scripts.backlog(keys))
    assert (backlog.waiting, backlog.in_flight) == (2, 2)
    assert [one.ref for one in await claim(redis, keys, 5)] == [queued[0], queued[3]]


async def test_cancelled_request_is_not_sent_again_by_a_late_submit(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (ref,) = await seed_queued(redis, keys)
    await cancel(redis, keys, ref)

    assert await run(redis, scripts.submit(keys, "caller", request(ref))) == {0: Submitted.DONE}


# twice, and too late


async def test_repeated_cancel_is_told_gone_and_changes_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (running,), parked = await seed_running(redis, keys), await seed_parked(redis, keys)
    await cancel(redis, keys, running.ref, parked)
    before = await read_everything(redis)

    assert await cancel(redis, keys, running.ref, parked) == [Ended.GONE] * 2
    assert await read_everything(redis) == before


async def test_ref_that_is_named_twice_is_told_of_once(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await run(redis, scripts.watch(keys, "waiters", "app.B~b", [one.ref]))
    async with open_inbox(redis, keys) as inbox, open_orders(redis, keys) as orders:
        _, waiters = await run(redis, scripts.cancel(keys, 60, "why not", [one.ref, one.ref]))

        assert await inbox.take() == {one.ref: b"cancelled normal " + one.entry + b"\nwhy not"}
        assert await inbox.is_empty()
        assert await orders.take_raw() == b"cancel normal " + one.entry
        assert await orders.is_empty()
    assert waiters == [Waiter(one.ref.encode(), "app.B~b")]


async def test_replica_that_finishes_after_all_is_told_that_it_ended(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await cancel(redis, keys, one.ref)

    refused, _ = await finish(redis, keys, one)

    assert refused == {0: Finished.ENDED}
    assert await read_state(redis, keys, one.ref) == State.CANCELLED


async def test_late_owner_of_a_request_that_was_taken_over_is_told_that_it_ended(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    (late,) = await seed_running(redis, keys)
    await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))
    (second,) = await claim(redis, keys, replica="r-2")
    await cancel(redis, keys, late.ref)

    refused = [(await finish(redis, keys, one))[0] for one in (late, second)]

    assert refused == [{0: Finished.ENDED}] * 2


async def test_cancelled_request_is_neither_handed_back_nor_released(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await cancel(redis, keys, one.ref)

    handed_back = await run(redis, scripts.hand_back(keys, "normal", "normal", [one.entry]))
    released = await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))

    assert (handed_back, released.requeued) == (0, 0)
    assert await claim(redis, keys) == []


async def test_value_that_comes_too_late_does_not_revive_a_parked_request(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = await seed_parked(redis, keys, A)
    await cancel(redis, keys, ref)

    supplied = await run(redis, scripts.supply(keys, ref, A, b"value", ["{ms:up.A}:value:x:1-1"]))

    assert supplied == Supplied.GONE
    assert await read_state(redis, keys, ref) == State.CANCELLED


async def test_entry_that_has_vanished_ends_all_the_same(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await redis.xdel(keys.lane("normal"), one.entry.decode())

    assert await cancel(redis, keys, one.ref) == [Ended.ENDED]
    assert await read_state(redis, keys, one.ref) == State.CANCELLED


async def test_request_in_a_lane_that_lost_its_group_is_cancelled(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (ref,) = await seed_queued(redis, keys)
    await redis.xgroup_destroy(keys.lane("normal"), GROUP)

    assert await cancel(redis, keys, ref) == [Ended.ENDED]
    assert await read_state(redis, keys, ref) == State.CANCELLED


@pytest.mark.parametrize(("ttl_s", "state"), [("soon", "cancelled"), (60, "exploded"), (60, "succeeded")])
async def test_arguments_that_make_no_sense_write_nothing(
    redis: Control, keys: DeploymentKeys, ttl_s: Any, state: str
) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    before = await read_everything(redis)
    call = scripts.cancel(keys, ttl_s, "why not", [one.ref])

    with pytest.raises(REFUSED):
        await run(redis, Call(call.script, call.keys, (state, *call.arguments[1:]), call.read))

    assert await read_everything(redis) == before


# who is told


async def test_caller_readers_and_waiters_hear_of_it(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,), parked = await seed_running(redis, keys), await seed_parked(redis, keys)
    await run(redis, scripts.watch(keys, "readers", "anna", [one.ref]))
    await run(redis, scripts.watch(keys, "waiters", "app.B~b", [parked]))
    async with open_inbox(redis, keys) as caller, open_inbox(redis, keys, "anna") as anna:
        _, waiters = await run(redis, scripts.cancel(keys, 60, "why not", [one.ref, parked]))

        told = {one.ref: b"cancelled normal " + one.entry + b"\nwhy not"}
        assert await caller.take() == {**told, parked: b"cancelled - -\nwhy not"}
        assert await anna.take() == told
    assert waiters == [Waiter(parked.encode(), "app.B~b")]
    assert not await redis.exists(keys.notes)


@pytest.mark.parametrize(("extras", "order"), [("", b"cancel"), ("matched", b"cancel"), (asking(kill=True), b"kill")])
async def test_replica_that_runs_it_is_told_and_how_hard_it_may_be(
    redis: Control, keys: DeploymentKeys, extras: str, order: bytes
) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys, lane="high", replica="r-2", extras=extras)
    async with open_orders(redis, keys, "r-1") as others, open_orders(redis, keys, "r-2") as orders:
        await cancel(redis, keys, one.ref)

        assert await orders.take_raw() == order + b" high " + one.entry
        assert await others.is_empty()


async def test_second_owner_is_told_and_not_the_first(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (first,) = await seed_running(redis, keys)
    await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))
    (second,) = await claim(redis, keys, replica="r-2")
    async with open_orders(redis, keys, "r-1") as late, open_orders(redis, keys, "r-2") as orders:
        await cancel(redis, keys, first.ref)

        assert await orders.take_raw() == b"cancel returned " + second.entry
        assert await late.is_empty()


async def test_no_replica_is_told_of_what_it_has_not_taken(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await seed_running(redis, keys)
    (queued,), parked = await seed_queued(redis, keys), await seed_parked(redis, keys)
    async with open_orders(redis, keys) as orders:
        await cancel(redis, keys, queued, parked)

        assert await orders.is_empty()


# discard


@pytest.mark.parametrize("running", [True, False])
async def test_all_that_is_open_is_discarded_and_what_runs_only_where_wanted(
    redis: Control, keys: DeploymentKeys, running: bool
) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys, extras=asking(timeout_ms=60_000))
    waiting = [*await seed_queued(redis, keys), await seed_parked(redis, keys), await seed_delayed(redis, keys)]
    async with open_orders(redis, keys) as orders:
        await discard(redis, keys, running=running)

        assert await read_states(redis, keys, waiting) == [State.CANCELLED] * 3
        if running:
            assert await orders.take_raw() == b"cancel normal " + one.entry
            assert not await redis.exists(keys.open, keys.deadlines)
        else:
            assert await orders.is_empty()
            assert await finish(redis, keys, one) == ({}, [])


async def test_discard_reports_who_waits_and_again_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (ref,) = await seed_queued(redis, keys)
    await run(redis, scripts.watch(keys, "waiters", "app.B~b", [ref]))

    waiters = await discard(redis, keys, running=True)
    before = await read_everything(redis)

    assert waiters == [Waiter(ref.encode(), "app.B~b")]
    assert await discard(redis, keys, running=True) == []
    assert await read_everything(redis) == before
