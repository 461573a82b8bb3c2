"""Every verb of the broker: what it finds on the server, and its call."""

from collections.abc import Awaitable, Callable
from typing import Any

from millstream.broker import control_scripts, scripts
from millstream.broker.call import Call
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys, Keys
from tests.helpers import (
    BODY,
    CALLER,
    REPLICA,
    age,
    asking,
    emit,
    new_ref,
    request,
    seed_delayed,
    seed_parked,
    seed_queued,
    seed_running,
)

ALL = Keys("ms")
UP = "up.Up~" + "u" * 22
VALUE = b"succeeded normal 1-1\na value"
Seed = Callable[[Control, DeploymentKeys], Awaitable[Call[Any]]]
VERBS: dict[str, Seed] = {}
SAME_ANSWER: set[str] = set()


def verb(seed: Seed) -> Seed:
    """What the verb finds, and its call."""
    VERBS[seed.__name__] = seed
    return seed


def same_answer(seed: Seed) -> Seed:
    """Whoever asks again is told the same."""
    SAME_ANSWER.add(seed.__name__)
    return seed


# from the caller


@verb
async def submit(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    return scripts.submit(keys, CALLER, [part for lane in ("high", "low") for part in request(new_ref(), lane=lane)])


@verb
async def submit_with_large_arguments(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    ref = new_ref()
    await redis.set(keys.payload(ref), b"large arguments", px=600_000)
    return scripts.submit(keys, CALLER, request(ref, extras=asking(payload=True, timeout_ms=3_600_000), body=b""))


@verb
async def hold(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    return scripts.hold(keys, CALLER, new_ref().encode(), "normal", b"m", BODY, depends_on=[UP, UP + "2"])


@verb
async def hold_for_later(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    return scripts.hold(keys, CALLER, new_ref().encode(), "low", b"m", BODY, delay_ms=3_600_000)


@verb
@same_answer
async def watch(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    return scripts.watch(keys, "readers", "another", await seed_queued(redis, keys, 2))


@verb
@same_answer
async def place(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    return scripts.place(keys, await seed_parked(redis, keys))


@verb
async def cancel(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    (one,), parked = await seed_running(redis, keys), await seed_parked(redis, keys)
    return scripts.cancel(keys, 60, "why not", [one.ref, parked, *await seed_queued(redis, keys)])


@verb
async def expire(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    (ref,) = await seed_queued(redis, keys, extras=asking(timeout_ms=3_600_000))
    await age(redis, keys.deadlines, ref)
    return scripts.cancel(keys, 60, "late", [ref], overdue=True)


@verb
async def forestall(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    return scripts.forestall(keys, new_ref(), 60, "why not")


@verb
async def wake(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    ref = await seed_delayed(redis, keys)
    await age(redis, keys.due, ref)
    return scripts.wake(keys)


@verb
async def consume(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    (one,) = await seed_running(redis, keys, extras=asking(stream=10))
    await emit(redis, keys, one, 0, b"a", b"b", b"c")
    await redis.set(keys.value(one.ref, "1-0"), b"a large item", px=600_000)
    return scripts.consume(keys, one.ref, 2, ["1-0"])


# from the replica


@verb
async def finish(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    first, second = await seed_running(redis, keys, 2)
    await run(redis, scripts.watch(keys, "waiters", "w", [first.ref]))
    outcomes = (first.entry, first.ref, CALLER, "succeeded", b"v", second.entry, second.ref, CALLER, "failed", b"e")
    return scripts.finish(keys, "normal", 60, outcomes)


@verb
async def finish_with_a_large_value(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    (one,) = await seed_running(redis, keys)
    await redis.set(keys.value(one.ref, one.entry.decode()), b"large", px=600_000)
    return scripts.finish(keys, "normal", 60, (one.entry, one.ref, CALLER, "succeeded", b"@5"))


@verb
async def retry(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    (one,) = await seed_running(redis, keys)
    return scripts.retry(keys, "normal", (one.entry, one.ref, 3_600_000, '{"replica": "r-1", "cause": "raised"}'))


@verb
async def emit_items(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    (one,) = await seed_running(redis, keys, extras=asking(stream=10))
    return scripts.emit(keys, one.ref, f"normal {one.entry.decode()}", CALLER.encode(), 60, 0, [b"a", b"b"])


@verb
async def hand_back(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    return scripts.hand_back(keys, "normal", "normal", [one.entry for one in await seed_running(redis, keys, 2)])


@verb
async def supply(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    return scripts.supply(keys, await seed_parked(redis, keys, UP), UP, VALUE, ["{ms:up.Up}:value:x"])


@verb
async def supply_one_of_two(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    return scripts.supply(keys, await seed_parked(redis, keys, UP, UP + "2"), UP, VALUE)


@verb
async def supply_early(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    return scripts.supply(keys, await seed_parked(redis, keys, UP, delay_ms=3_600_000), UP, VALUE)


@verb
async def reject(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    return scripts.reject(keys, await seed_parked(redis, keys, UP), 60, b"an error")


@verb
@same_answer
async def keep(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    await redis.set(keys.value("v", "1-1"), b"large", px=60_000)
    return scripts.keep([keys.value("v", "1-1")])


@verb
@same_answer
async def renew(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    return control_scripts.renew([keys.lease(REPLICA)], 60, "launcher")


@verb
async def enlist(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    await run(redis, control_scripts.renew([keys.lease(REPLICA)], 60, "launcher"))
    return control_scripts.enlist(keys.replicas, REPLICA, "{}", only_if_new=True)


@verb
async def groups(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    await redis.delete(*keys.lanes)
    return control_scripts.groups(keys)


# from sweepers


@verb
async def sweep(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    delayed, parked = await seed_delayed(redis, keys), await seed_parked(redis, keys)
    await age(redis, keys.due, delayed)
    await age(redis, keys.parked, parked)
    return control_scripts.sweep(keys)


@verb
async def release(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    await seed_running(redis, keys, 2)
    return scripts.release(keys, "normal", REPLICA, "killed", expired=False)


@verb
async def release_and_bury(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    await seed_running(redis, keys, extras=asking(attempts=1))
    return scripts.release(keys, "normal", REPLICA, "killed", expired=True)


@verb
async def bury(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    one, _ = await seed_running(redis, keys, 2)
    return scripts.bury(keys, one.lane, one.entry, REPLICA, "cannot be read")


@verb
async def discard(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    await seed_running(redis, keys)
    await seed_queued(redis, keys, 2)
    await seed_parked(redis, keys)
    return scripts.discard(keys, "0", 60, "deleted", running=True)


# from operators, the autoscaler and who deploys


async def seed_dead(redis: Control, keys: DeploymentKeys) -> list[str]:
    await seed_running(redis, keys, 2, extras=asking(attempts=1))
    await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))
    rows: Any = await redis.xrange(keys.dead)
    return [entry.decode() for entry, _ in rows]


@verb
async def requeue(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    return scripts.requeue(keys, await seed_dead(redis, keys))


@verb
async def drop(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    return scripts.drop(keys, (await seed_dead(redis, keys))[:1])


@verb
@same_answer
async def lead(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    return control_scripts.lead(ALL, "a-1", 60)


@verb
@same_answer
async def decide(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    await run(redis, control_scripts.decide(keys, 1, 1, "at the start", {}))
    return control_scripts.decide(keys, 1, 3, "backlog grows", {"waiting": 5})


@verb
@same_answer
async def deploy(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    limits = ("3", "60", "", "")
    return control_scripts.deploy(keys, "rev", "code", "{}", b"definition", limits, configured=False)


@verb
@same_answer
async def deploy_unknown_code(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    return control_scripts.deploy(keys, "rev", "", "{}", b"definition", ("3", "60", "", ""), configured=True)


@verb
async def withdraw(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    await run(redis, await deploy(redis, keys))
    return control_scripts.withdraw(keys, "rev", "before", "{}", "it raised", "traceback", ("3", "60", "", ""))


@verb
@same_answer
async def note(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    await run(redis, await deploy(redis, keys))
    return control_scripts.note(keys, "rev", {"state": "DEPLOY_FAILED"})


@verb
@same_answer
async def close(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    await run(redis, await deploy(redis, keys))
    return control_scripts.close(keys, "rev")


@verb
async def remove(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    await run(redis, await deploy(redis, keys))
    await redis.delete(keys.config)
    return control_scripts.remove(keys)


@verb
async def replace(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    return control_scripts.replace(ALL, "app", b"", '{"name": "app"}')


@verb
@same_answer
async def backlog(redis: Control, keys: DeploymentKeys) -> Call[Any]:
    await seed_running(redis, keys, 2)
    return control_scripts.backlog(keys)
