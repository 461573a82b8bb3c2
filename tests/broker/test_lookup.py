"""`view_request` tells where a request is, in every state, and changes nothing."""

import pytest

from millstream.broker import control_scripts, scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.lookup import orphans, read_stored, view_request
from millstream.broker.registry import Registry
from millstream.broker.states import State
from millstream.config import Settings
from tests.helpers import (
    CALLER,
    REPLICA,
    asking,
    cancel,
    deploy_config,
    new_ref,
    seed_delayed,
    seed_parked,
    seed_queued,
    seed_running,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
async def registry(redis: Control, keys: DeploymentKeys, settings: Settings) -> Registry:
    await deploy_config(redis, keys)
    return Registry(redis, settings)


def ref_id(keys: DeploymentKeys, ref: str) -> str:
    return f"{keys.tag}~{ref}"


async def test_unknown(registry: Registry, keys: DeploymentKeys) -> None:
    assert await view_request(registry, ref_id(keys, new_ref())) is None


async def test_what_is_no_ref_id_is_refused(registry: Registry) -> None:
    with pytest.raises(ValueError, match="is not a ref id"):
        await view_request(registry, "hello")


async def test_queued(registry: Registry, redis: Control, keys: DeploymentKeys) -> None:
    (ref,) = await seed_queued(redis, keys, lane="high")

    view = await view_request(registry, ref_id(keys, ref))

    assert view is not None
    assert (view.state, view.lane, view.method, view.attempt) == (State.QUEUED, "high", "__call__", 1)
    assert view.since_s is not None and 0 <= view.since_s < 5
    assert view.replica == ""


async def test_queued_in_a_lane_without_a_group(registry: Registry, redis: Control, keys: DeploymentKeys) -> None:
    (ref,) = await seed_queued(redis, keys)
    await redis.xgroup_destroy(keys.lane("normal"), "replicas")

    view = await view_request(registry, ref_id(keys, ref))

    assert view is not None and view.state is State.QUEUED


async def test_running(registry: Registry, redis: Control, keys: DeploymentKeys) -> None:
    (claimed,) = await seed_running(redis, keys)

    view = await view_request(registry, ref_id(keys, claimed.ref))

    assert view is not None
    assert (view.state, view.replica, view.entry) == (State.RUNNING, REPLICA, claimed.entry.decode())
    assert view.since_s is not None and 0 <= view.since_s < 5


async def test_returned_tells_of_the_attempt_before(registry: Registry, redis: Control, keys: DeploymentKeys) -> None:
    (claimed,) = await seed_running(redis, keys)
    await run(redis, scripts.release(keys, "normal", REPLICA, "killed by signal 9", expired=False))

    view = await view_request(registry, ref_id(keys, claimed.ref))

    assert view is not None
    assert (view.state, view.lane, view.attempt) == (State.QUEUED, "returned", 2)
    assert [(one["replica"], one["cause"]) for one in view.history] == [(REPLICA, "killed by signal 9")]


async def test_parked_and_delayed(registry: Registry, redis: Control, keys: DeploymentKeys) -> None:
    parked = await seed_parked(redis, keys, "up.Up~" + "a" * 22, "up.Up~" + "b" * 22)
    await run(redis, scripts.supply(keys, parked, "up.Up~" + "a" * 22, b"succeeded - -\nvalue"))
    delayed = await seed_delayed(redis, keys, 60_000)

    waiting, later = [await view_request(registry, ref_id(keys, ref)) for ref in (parked, delayed)]

    assert waiting is not None and later is not None
    assert (waiting.state, waiting.waits_for, waiting.lane) == (State.PARKED, ["up.Up~" + "b" * 22], "normal")
    assert (later.state, later.waits_for) == (State.DELAYED, [])
    assert later.due_in_s is not None and 50 < later.due_in_s <= 60


@pytest.mark.parametrize("outcome", ["succeeded", "failed"])
async def test_ended(registry: Registry, redis: Control, keys: DeploymentKeys, outcome: str) -> None:
    (claimed,) = await seed_running(redis, keys)
    await run(redis, scripts.finish(keys, "normal", 60, [claimed.entry, claimed.ref, CALLER, outcome, b"an envelope"]))

    view = await view_request(registry, ref_id(keys, claimed.ref))

    assert view is not None
    assert (view.state, view.lane, view.entry) == (outcome, "normal", claimed.entry.decode())
    assert view.size_bytes == len(b"an envelope")
    assert view.expires_in_s is not None and 50 < view.expires_in_s <= 60
    assert (await read_stored(registry, view.ref_id)).endswith(b"\nan envelope")


async def test_large_value_is_as_large_as_it_is_where_it_lies(
    registry: Registry, redis: Control, keys: DeploymentKeys
) -> None:
    (claimed,) = await seed_running(redis, keys)
    await redis.set(keys.value(claimed.ref, claimed.entry.decode()), b"x" * 70_000, px=60_000)
    await run(redis, scripts.finish(keys, "normal", 60, [claimed.entry, claimed.ref, CALLER, "succeeded", b"@70000"]))

    view = await view_request(registry, ref_id(keys, claimed.ref))

    assert view is not None
    assert (view.state, view.size_bytes) == (State.SUCCEEDED, 70_000)


@pytest.mark.parametrize(("overdue", "state"), [(False, State.CANCELLED), (True, State.TIMED_OUT)])
async def test_ended_from_outside(
    registry: Registry, redis: Control, keys: DeploymentKeys, overdue: bool, state: State
) -> None:
    (ref,) = await seed_queued(redis, keys, extras=asking(timeout_ms=0))
    await cancel(redis, keys, ref, overdue=overdue)

    view = await view_request(registry, ref_id(keys, ref))

    assert view is not None
    assert (view.state, view.lane, view.size_bytes) == (state, "normal", len("why not"))
    assert await read_stored(registry, view.ref_id) == f"{state} normal {view.entry}\nwhy not".encode()


async def test_dead_tells_of_every_attempt(registry: Registry, redis: Control, keys: DeploymentKeys) -> None:
    await redis.hset(keys.config, mapping={"max_attempts": "1"})
    (claimed,) = await seed_running(redis, keys)
    await run(redis, scripts.release(keys, "normal", REPLICA, "killed by signal 9", expired=False))

    view = await view_request(registry, ref_id(keys, claimed.ref))

    assert view is not None
    assert (view.state, view.attempt) == (State.DEAD, 1)
    assert [one["cause"] for one in view.history] == ["killed by signal 9"]


async def test_value_that_was_put(registry: Registry, redis: Control, keys: DeploymentKeys) -> None:
    put = DeploymentKeys(keys.namespace, "put.07")
    ref = new_ref()
    await redis.set(put.result(ref), b"succeeded - -\nvalue", px=60_000)

    view = await view_request(registry, ref_id(put, ref))

    assert view is not None
    assert (view.state, view.lane, view.entry, view.size_bytes) == (State.SUCCEEDED, "", "", 5)


async def test_looking_writes_nothing(registry: Registry, redis: Control, keys: DeploymentKeys) -> None:
    (ref,) = await seed_queued(redis, keys)
    before = {key: await redis.dump(key) for key in sorted(await redis.keys())}

    await view_request(registry, ref_id(keys, ref))
    await orphans(registry, keys.tag)

    assert {key: await redis.dump(key) for key in sorted(await redis.keys())} == before


async def test_orphans_are_consumers_without_a_lease_that_hold_something(
    registry: Registry, redis: Control, keys: DeploymentKeys
) -> None:
    assert await orphans(registry, "no.such") == {}
    await seed_running(redis, keys, 2, replica="r-gone")
    await seed_running(redis, keys, 1, replica="r-alive", lane="high")
    await run(redis, control_scripts.renew([keys.lease("r-alive")], 60, "node"))

    assert await orphans(registry, keys.tag) == {"r-gone": 2}
