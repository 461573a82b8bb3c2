"""release.lua: what a dead replica held goes back to `returned`, or is buried."""

import json
from typing import Any

import pytest

from millstream.broker import control_scripts, scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import GROUP, DeploymentKeys
from millstream.broker.scripts import Released, Waiter
from millstream.broker.states import State
from tests.helpers import (
    BODY,
    CALLER,
    REPLICA,
    claim,
    deploy_config,
    open_inbox,
    read_everything,
    read_result,
    read_state,
    read_states,
    seed_queued,
    seed_running,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]

ALIVE = Released(alive=True, requeued=0, buried=0, more=False, waiters=[])
NOTHING = Released(alive=False, requeued=0, buried=0, more=False, waiters=[])


async def release(
    redis: Control, keys: DeploymentKeys, lane: str = "normal", *, replica: str = REPLICA, expired: bool = False
) -> Released:
    return await run(redis, scripts.release(keys, lane, replica, "killed by signal 9", expired=expired))


async def consumers(redis: Control, keys: DeploymentKeys, lane: str = "normal") -> set[str]:
    rows: Any = await redis.xinfo_consumers(keys.lane(lane), GROUP)
    return {row["name"].decode() for row in rows}


async def test_requests_return_with_the_next_attempt_and_the_cause(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    before_s, _ = await redis.time()

    released = await release(redis, keys)

    (again,) = await claim(redis, keys, replica="r-2")
    after_s, _ = await redis.time()
    (cause,) = json.loads(again.fields.pop(b"history"))
    assert released == Released(alive=False, requeued=1, buried=0, more=False, waiters=[])
    assert again.lane == "returned"
    assert again.fields == one.fields | {b"attempt": b"2", b"lane": b"normal"}
    assert before_s <= cause.pop("at_ms") / 1000 <= after_s + 1
    assert cause == {"replica": REPLICA, "cause": "killed by signal 9", "attempt": 1}


async def test_each_further_death_adds_to_the_history(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await seed_running(redis, keys, lane="low")
    await release(redis, keys, "low")
    await claim(redis, keys, replica="r-2")

    await release(redis, keys, "returned", replica="r-2")

    (third,) = await claim(redis, keys, replica="r-3")
    history = json.loads(third.fields[b"history"])
    assert third.fields[b"attempt"] == b"3"
    assert third.fields[b"lane"] == b"low"
    assert [(cause["replica"], cause["attempt"]) for cause in history] == [(REPLICA, 1), ("r-2", 2)]


async def test_hundreds_are_released_a_hundred_at_a_time_in_their_order(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    attempts = await seed_running(redis, keys, 250)

    steps = [await release(redis, keys) for _ in range(4)]

    assert [(step.requeued, step.more) for step in steps] == [(100, True), (100, True), (50, False), (0, False)]
    assert [one.ref for one in await claim(redis, keys, 300)] == [one.ref for one in attempts]


async def test_consumer_is_deleted_only_when_nothing_is_pending(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await seed_running(redis, keys, 100)

    await release(redis, keys)
    after_the_first = await consumers(redis, keys)
    await release(redis, keys)

    assert after_the_first == {REPLICA}
    assert await consumers(redis, keys) == set()


async def test_other_replicas_keep_what_they_hold(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await seed_running(redis, keys, 3, replica="r-1")
    kept = await seed_running(redis, keys, 3, replica="r-2")

    await release(redis, keys, replica="r-1")

    assert await read_states(redis, keys, [one.ref for one in kept]) == [State.RUNNING] * 3
    assert await consumers(redis, keys) == {"r-2"}


async def test_release_is_of_one_lane(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (high,) = await seed_running(redis, keys, lane="high")
    (normal,) = await seed_running(redis, keys, lane="normal")

    await release(redis, keys, "normal")

    assert await read_states(redis, keys, [high.ref, normal.ref]) == [State.RUNNING, State.QUEUED]


async def test_repeated_release_changes_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await seed_running(redis, keys, 3)
    await release(redis, keys)
    before = await read_everything(redis)

    assert await release(redis, keys) == NOTHING
    assert await read_everything(redis) == before


async def test_replica_that_held_nothing_and_lane_without_group_are_no_error(
    redis: Control, keys: DeploymentKeys
) -> None:
    without_group = await release(redis, keys)
    await deploy_config(redis, keys)

    assert await release(redis, keys) == without_group == NOTHING


async def test_request_is_buried_when_its_attempts_are_used_up(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys, max_attempts=2, result_ttl_s=7)
    (one,) = await seed_running(redis, keys)
    await release(redis, keys)
    (second,) = await claim(redis, keys, replica="r-2")

    released = await release(redis, keys, "returned", replica="r-2")

    result = await read_result(redis, keys, one.ref)
    assert (released.requeued, released.buried) == (0, 1)
    assert await read_state(redis, keys, one.ref) == State.DEAD
    assert result is not None
    assert result[0] == f"dead returned {second.entry.decode()}"
    assert [cause["replica"] for cause in json.loads(result[1])] == [REPLICA, "r-2"]
    assert 0 < await redis.pttl(keys.result(one.ref)) <= 7000


async def test_dead_letter_keeps_body_and_history(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys, max_attempts=1)
    (one,) = await seed_running(redis, keys, lane="low")

    await release(redis, keys, "low")

    letters: Any = await redis.xrange(keys.dead)
    ((_, letter),) = letters
    assert letter.items() >= {(b"ref", one.ref.encode()), (b"method", b"__call__"), (b"body", BODY), (b"lane", b"low")}
    assert [cause["cause"] for cause in json.loads(letter[b"history"])] == ["killed by signal 9"]


async def test_callers_and_waiters_hear_of_a_burial(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys, max_attempts=1)
    (one,) = await seed_running(redis, keys)
    await run(redis, scripts.watch(keys, "waiters", "app.B~b", [one.ref]))
    async with open_inbox(redis, keys, CALLER) as inbox:
        released = await release(redis, keys)

        (told,) = (await inbox.take()).items()
    assert told[0] == one.ref
    assert told[1].startswith(b"dead normal " + one.entry + b'\n[{"')
    assert released.waiters == [Waiter(one.ref.encode(), "app.B~b")]


async def test_one_release_may_bury_some_and_requeue_others(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys, max_attempts=2)
    old = await seed_running(redis, keys, 2)
    await release(redis, keys)
    new = await seed_queued(redis, keys, 2, lane="returned")
    await claim(redis, keys, 4, replica="r-2")

    released = await release(redis, keys, "returned", replica="r-2")

    assert (released.requeued, released.buried) == (2, 2)
    assert await read_states(redis, keys, [one.ref for one in old]) == [State.DEAD] * 2
    assert await read_states(redis, keys, new) == [State.QUEUED] * 2


async def test_release_by_lease_is_refused_while_there_is_one(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await run(redis, control_scripts.renew([keys.lease(REPLICA)], 10, "launcher"))

    assert await release(redis, keys, expired=True) == ALIVE
    assert await read_state(redis, keys, one.ref) == State.RUNNING


async def test_release_by_lease_is_carried_out_once_it_has_ended(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await run(redis, control_scripts.renew([keys.lease(REPLICA)], 10, "launcher"))
    await redis.pexpire(keys.lease(REPLICA), 0)

    released = await release(redis, keys, expired=True)

    assert released.requeued == 1
    assert await read_state(redis, keys, one.ref) == State.QUEUED


async def test_death_that_a_parent_saw_does_not_wait_for_the_lease(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await run(redis, control_scripts.renew([keys.lease(REPLICA)], 10, "launcher"))

    await release(redis, keys, expired=False)

    assert await read_state(redis, keys, one.ref) == State.QUEUED


async def test_entry_whose_body_is_gone_does_not_stop_the_others(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    gone, other = await seed_running(redis, keys, 2)
    await redis.xdel(keys.lane("normal"), gone.entry.decode())
    await redis.hdel(keys.open, gone.ref)

    released = await release(redis, keys)

    assert released.requeued == 1
    assert await read_state(redis, keys, other.ref) == State.QUEUED
    assert await consumers(redis, keys) == set()


async def test_fraction_of_a_second_in_the_result_ttl_loses_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys, max_attempts=1, result_ttl_s=2.5)
    (one,) = await seed_running(redis, keys)

    await release(redis, keys)

    assert await read_state(redis, keys, one.ref) == State.DEAD


async def test_entry_that_is_no_request_is_kept_as_a_dead_letter_and_stops_nobody(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    await redis.xadd(keys.lane("normal"), {"written": "by hand"})
    (ref,) = await seed_queued(redis, keys)
    await run(redis, scripts.claim(keys, REPLICA, 5))

    released = await release(redis, keys)

    letters: Any = await redis.xrange(keys.dead)
    assert (released.requeued, released.buried) == (1, 1)
    assert await read_state(redis, keys, ref) == State.QUEUED
    assert [letter[b"written"] for _, letter in letters] == [b"by hand"]


async def test_request_is_cancelled_where_the_deployment_is_being_deleted(redis: Control, keys: DeploymentKeys) -> None:
    """Its config is gone, and with it what was allowed: a request that may run once only must not run again."""
    await deploy_config(redis, keys, max_attempts=1)
    (one,) = await seed_running(redis, keys)
    await redis.delete(keys.config)

    released = await release(redis, keys)

    assert (released.requeued, released.buried) == (0, 0)
    assert await read_state(redis, keys, one.ref) == State.CANCELLED
    assert await run(redis, control_scripts.remove(keys)) == control_scripts.Removed.REMOVED
