"""forestall.lua: a caller cancels a request of its own that may still be on its way; then it comes and is not run."""

import pytest

from millstream.broker import scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.scripts import Forestalled, Submitted
from millstream.broker.states import State
from tests.helpers import (
    CALLER,
    claim,
    deploy_config,
    finish,
    new_ref,
    read_everything,
    read_result,
    read_state,
    request,
    seed_delayed,
    seed_parked,
    seed_queued,
    seed_running,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]

TTL_S = 60


async def forestall(redis: Control, keys: DeploymentKeys, ref: str) -> Forestalled:
    return await run(redis, scripts.forestall(keys, ref, TTL_S, "why"))


async def test_unknown_request_is_cancelled_for_a_while(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()

    assert await forestall(redis, keys, ref) is Forestalled.FORESTALLED

    assert await read_state(redis, keys, ref) is State.CANCELLED
    assert await read_result(redis, keys, ref) == ("cancelled - -", b"why")
    assert 0 < await redis.ttl(keys.result(ref)) <= TTL_S


async def test_request_that_comes_later_is_not_taken_in(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()
    await forestall(redis, keys, ref)

    submitted = await run(redis, scripts.submit(keys, CALLER, request(ref)))
    held = await run(redis, scripts.hold(keys, CALLER, ref.encode(), "normal", b"m", b"body", delay_ms=1000))

    assert (submitted, held) == ({0: Submitted.DONE}, Submitted.DONE)
    assert await claim(redis, keys) == []


async def test_twice_is_as_once(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()
    await forestall(redis, keys, ref)
    before = await read_everything(redis)

    assert await forestall(redis, keys, ref) is Forestalled.ENDED

    assert await read_everything(redis) == before


@pytest.mark.parametrize("state", [State.PARKED, State.DELAYED, State.QUEUED, State.RUNNING])
async def test_request_that_has_come_is_left_alone(redis: Control, keys: DeploymentKeys, state: State) -> None:
    await deploy_config(redis, keys)
    match state:
        case State.PARKED:
            ref = await seed_parked(redis, keys)
        case State.DELAYED:
            ref = await seed_delayed(redis, keys)
        case State.QUEUED:
            (ref,) = await seed_queued(redis, keys)
        case _:
            ref = (await seed_running(redis, keys))[0].ref
    before = await read_everything(redis)

    assert await forestall(redis, keys, ref) is Forestalled.OPEN

    assert await read_everything(redis) == before
    assert await read_state(redis, keys, ref) is state


async def test_request_that_has_ended_keeps_its_result(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await finish(redis, keys, one)
    before = await read_everything(redis)

    assert await forestall(redis, keys, one.ref) is Forestalled.ENDED

    assert await read_everything(redis) == before
