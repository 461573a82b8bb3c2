"""submit.lua with max_queued: how many may wait, for all callers together, and who is never refused."""

from collections.abc import AsyncIterator

import pytest

from millstream.broker import control_scripts, scripts
from millstream.broker.cluster import dial_everywhere
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.link import Link
from millstream.broker.scripts import Submitted, Supplied
from millstream.broker.states import State
from millstream.config import Settings
from tests.helpers import (
    CALLER,
    REPLICA,
    age,
    asking,
    cancel,
    claim,
    deploy_config,
    finish,
    new_ref,
    read_everything,
    read_state,
    request,
    seed_delayed,
    seed_parked,
    seed_queued,
    seed_running,
)

pytestmark = pytest.mark.anyio

A = "up.A~" + "a" * 22


async def submit(redis: Control, keys: DeploymentKeys, *refs: str, extras: str = "") -> dict[int, Submitted]:
    return await run(redis, scripts.submit(keys, CALLER, [p for ref in refs for p in request(ref, extras=extras)]))


@pytest.mark.fake
async def test_as_many_as_the_limit_are_taken_and_the_rest_is_refused_by_position(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys, max_queued=3)

    answers = await submit(redis, keys, *(new_ref() for _ in range(5)))

    assert answers == {3: Submitted.FULL, 4: Submitted.FULL}
    assert await redis.xlen(keys.lane("normal")) == 3


@pytest.mark.fake
async def test_refused_request_leaves_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys, max_queued=1, timeout_ms=60_000)
    await seed_queued(redis, keys)
    ref = new_ref()
    await redis.set(keys.payload(ref), b"arguments", px=600_000)
    before = await read_everything(redis)

    answers = await submit(redis, keys, ref, extras=asking(payload=True, want="matched"))

    assert answers == {0: Submitted.FULL}
    assert await read_everything(redis) == before
    assert 0 < await redis.pttl(keys.payload(ref)) <= 600_000


@pytest.mark.fake
async def test_requests_of_all_priorities_count_together(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys, max_queued=4)
    for lane in ("high", "normal", "low"):
        await seed_queued(redis, keys, lane=lane)

    answers = await run(
        redis, scripts.submit(keys, CALLER, request(new_ref(), lane="high") + request(new_ref(), lane="low"))
    )

    assert answers == {1: Submitted.FULL}


@pytest.mark.fake
async def test_what_runs_does_not_count_and_what_is_taken_makes_room(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys, max_queued=2)
    refs = await seed_queued(redis, keys, 2)
    full = await submit(redis, keys, new_ref())

    await claim(redis, keys, 2)

    assert full == {0: Submitted.FULL}
    assert await submit(redis, keys, new_ref(), new_ref(), new_ref()) == {2: Submitted.FULL}
    assert await read_state(redis, keys, refs[0]) == State.RUNNING


@pytest.mark.fake
async def test_what_ends_in_the_queue_makes_room(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys, max_queued=2)
    first, second = await seed_queued(redis, keys, 2)
    await redis.zadd(keys.deadlines, {second: 1})

    await cancel(redis, keys, first)
    await cancel(redis, keys, second, overdue=True)

    assert await submit(redis, keys, new_ref(), new_ref(), new_ref()) == {2: Submitted.FULL}


@pytest.mark.fake
async def test_returned_parked_and_delayed_requests_do_not_count(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys, max_queued=1)
    await seed_running(redis, keys)
    await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))
    await seed_parked(redis, keys)
    await seed_delayed(redis, keys)

    assert await submit(redis, keys, new_ref(), new_ref()) == {1: Submitted.FULL}


@pytest.mark.fake
async def test_returned_parked_and_delayed_requests_are_never_refused(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys, max_queued=1)
    released, handed_back = (await seed_running(redis, keys, 1))[0], (await seed_running(redis, keys, lane="low"))[0]
    await seed_queued(redis, keys)

    parked, delayed = await seed_parked(redis, keys, A), await seed_delayed(redis, keys)
    await age(redis, keys.due, delayed)
    supplied = await run(redis, scripts.supply(keys, parked, A, b"value"))
    woken = await run(redis, scripts.wake(keys))
    requeued = (await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))).requeued
    returned = await run(redis, scripts.hand_back(keys, "low", "low", [handed_back.entry]))

    assert (supplied, woken, requeued, returned) == (Supplied.QUEUED, 1, 1, 1)
    assert await read_state(redis, keys, released.ref) == State.QUEUED


@pytest.mark.fake
async def test_retry_of_an_accepted_submit_is_told_open_and_not_full(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys, max_queued=2)
    (ended,) = await seed_running(redis, keys)
    await finish(redis, keys, ended)
    refs = [new_ref() for _ in range(3)]
    await submit(redis, keys, *refs)  # its reply gets lost

    answers = await submit(redis, keys, *refs, ended.ref)

    assert answers == {0: Submitted.OPEN, 1: Submitted.OPEN, 2: Submitted.FULL, 3: Submitted.DONE}


@pytest.mark.fake
async def test_ref_twice_in_a_batch_takes_one_place(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys, max_queued=2)
    ref = new_ref()

    assert await submit(redis, keys, ref, ref, new_ref(), new_ref()) == {1: Submitted.OPEN, 3: Submitted.FULL}


@pytest.mark.fake
async def test_request_without_its_arguments_takes_no_place(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys, max_queued=1)

    answers = await run(
        redis, scripts.submit(keys, CALLER, request(new_ref(), extras=asking(payload=True)) + request(new_ref()))
    )

    assert answers == {0: Submitted.MISSING}


@pytest.mark.fake
async def test_lane_that_lost_its_group_counts_as_a_whole(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys, max_queued=2)
    await seed_running(redis, keys, 2)

    await redis.xgroup_destroy(keys.lane("normal"), "replicas")

    assert await submit(redis, keys, new_ref()) == {0: Submitted.FULL}


# several callers at once


@pytest.fixture
async def links(settings: Settings) -> AsyncIterator[list[Link]]:
    links = [await dial_everywhere(settings, f"caller-{number}") for number in range(4)]
    yield links
    for link in links:
        link.close()


async def test_limit_is_exact_for_several_callers_at_once(
    redis: Control, keys: DeploymentKeys, links: list[Link]
) -> None:
    await deploy_config(redis, keys, max_queued=50)

    calls = [link.run(scripts.submit(keys, CALLER, request(new_ref()))) for _ in range(40) for link in links]
    answers = [await call for call in calls]

    assert answers.count({}) == await redis.xlen(keys.lane("normal")) == 50
    assert answers.count({0: Submitted.FULL}) == 110


async def test_limit_holds_while_a_replica_takes_and_finishes(
    redis: Control, keys: DeploymentKeys, links: list[Link]
) -> None:
    await deploy_config(redis, keys, max_queued=5)
    most_waiting, accepted, finished = 0, 0, 0

    for _ in range(20):
        calls = [link.run(scripts.submit(keys, CALLER, request(new_ref()) + request(new_ref()))) for link in links]
        claimed = await claim(redis, keys, 3)
        if claimed:
            await finish(redis, keys, *claimed)
        accepted += sum(2 - len(answer) for answer in [await call for call in calls])
        finished += len(claimed)
        most_waiting = max(most_waiting, (await run(redis, control_scripts.backlog(keys))).waiting)

    assert most_waiting <= 5 < accepted
    assert accepted == finished + (await run(redis, control_scripts.backlog(keys))).waiting
