"""submit.lua: unknown -> queued."""

import pytest
from redis.exceptions import ResponseError

from millstream.broker import scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import LANES, DeploymentKeys
from millstream.broker.scripts import Submitted
from millstream.broker.states import State
from tests.helpers import (
    CALLER,
    claim,
    deploy_config,
    finish,
    new_ref,
    read_everything,
    read_state,
    read_states,
    request,
    seed_running,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]


async def test_request_is_queued_with_its_fields(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()

    answers = await run(redis, scripts.submit(keys, "caller-7", request(ref, method=b"embed", body=b"\x00\r\n\xff")))

    (one,) = await claim(redis, keys)
    assert answers == {}
    assert one.fields == {b"ref": ref.encode(), b"method": b"embed", b"reply": b"caller-7", b"body": b"\x00\r\n\xff"}


async def test_wish_to_hear_of_the_match_travels_along(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)

    await run(redis, scripts.submit(keys, CALLER, request(new_ref(), extras="matched")))

    (one,) = await claim(redis, keys)
    assert one.fields[b"want"] == b"matched"


@pytest.mark.parametrize("lane", LANES)
async def test_request_goes_to_its_lane(redis: Control, keys: DeploymentKeys, lane: str) -> None:
    await deploy_config(redis, keys)

    await run(redis, scripts.submit(keys, CALLER, request(new_ref(), lane=lane)))

    assert {name: await redis.xlen(keys.lane(name)) for name in LANES} == {**dict.fromkeys(LANES, 0), lane: 1}


async def test_batch_keeps_its_order(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    refs = [new_ref() for _ in range(1000)]

    await run(redis, scripts.submit(keys, CALLER, [part for ref in refs for part in request(ref)]))

    assert [one.ref for one in await claim(redis, keys, 1000)] == refs


@pytest.mark.parametrize("lane", ["normal", "high"])
async def test_repeated_submit_is_told_open_and_adds_nothing(redis: Control, keys: DeploymentKeys, lane: str) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()
    await run(redis, scripts.submit(keys, CALLER, request(ref)))
    before = await read_everything(redis)

    answers = await run(redis, scripts.submit(keys, CALLER, request(ref, body=b"another body", lane=lane)))

    assert answers == {0: Submitted.OPEN}
    assert await read_everything(redis) == before


async def test_submit_repeated_after_the_finish_is_told_done_and_runs_nothing(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await finish(redis, keys, one)

    answers = await run(redis, scripts.submit(keys, CALLER, request(one.ref)))

    assert answers == {0: Submitted.DONE}
    assert await read_state(redis, keys, one.ref) == State.SUCCEEDED
    assert await claim(redis, keys) == []


async def test_batch_answers_by_position(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ended, running = await seed_running(redis, keys, 2)
    await finish(redis, keys, ended)
    refs = [new_ref(), ended.ref, new_ref(), running.ref, new_ref()]

    answers = await run(redis, scripts.submit(keys, CALLER, [part for ref in refs for part in request(ref)]))

    assert answers == {1: Submitted.DONE, 3: Submitted.OPEN}
    assert await read_states(redis, keys, refs) == [
        State.QUEUED,
        State.SUCCEEDED,
        State.QUEUED,
        State.RUNNING,
        State.QUEUED,
    ]


async def test_ref_twice_in_a_batch_is_one_request(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()

    answers = await run(redis, scripts.submit(keys, CALLER, request(ref) + request(ref)))

    assert answers == {1: Submitted.OPEN}
    assert len(await claim(redis, keys, 5)) == 1


async def test_without_deployment_nothing_is_written(redis: Control, keys: DeploymentKeys) -> None:
    call = scripts.submit(keys, CALLER, request(new_ref()))

    with pytest.raises(ResponseError, match="NODEPLOYMENT"):
        await run(redis, call)

    assert await read_everything(redis) == {}
