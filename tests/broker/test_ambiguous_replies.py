"""Every verb with its connection cut, at points spread over the request and over the reply, and then sent again as its
caller does: what is in the server is as if nothing had happened, and nothing was added twice."""

import asyncio
import inspect
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from millstream.broker import control_scripts, scripts
from millstream.broker.call import Call
from millstream.broker.connection import Control, open_control, run
from millstream.broker.keys import GROUP, DeploymentKeys, Keys
from millstream.broker.link import Link, dial
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError
from tests.helpers import (
    BODY,
    CALLER,
    REPLICA,
    age,
    asking,
    claim,
    deploy_config,
    emit,
    new_ref,
    read_everything,
    request,
    seed_delayed,
    seed_parked,
    seed_queued,
    seed_running,
)
from tests.leaks import NO_TTL, find_lost, take_snapshot
from tests.proxy import Proxy
from tests.servers import Server

pytestmark = [pytest.mark.anyio, pytest.mark.any_server]

ALL = Keys("ms")
UP = "up.Up~" + "u" * 22
VALUE = b"succeeded normal 1-1\na value"
REF = r"\b0{10}\d{12}"
POINTS = 6  # cuts in the request, and as many in the reply
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


# the test


def test_every_verb_is_tried() -> None:
    modules = [scripts, control_scripts]
    names = {name for module in modules for name in re.findall(r'script\("(\w+)"\)', inspect.getsource(module))}

    assert names - {"claim"} <= {name.replace("emit_items", "emit") for name in VERBS}


class Bench:
    """A server behind a proxy, and one verb after the other."""

    def __init__(self, proxy: Proxy, redis: Control, blocking: Any, keys: DeploymentKeys) -> None:
        self.proxy, self.redis, self.keys = proxy, redis, keys
        self.settings, self._blocking = Settings(proxy.url), blocking

    async def prepare(self, seed: Seed) -> Call[Any]:
        await self.redis.flushall()
        await deploy_config(self.redis, self.keys)
        return await seed(self.redis, self.keys)

    async def dial(self) -> Link:
        return await dial(self.settings, "through")

    async def outcome(self) -> Any:
        """All that is there, whether it has a TTL, and how much was ever added. Fails if that contradicts itself."""
        snapshot = await asyncio.to_thread(take_snapshot, self._blocking)
        assert find_lost(snapshot) == []
        lives = {name: ttl_ms != NO_TTL for name, ttl_ms in snapshot.ttls_ms.items()}
        return normal(await read_everything(self.redis), lives, await self._added())

    async def _added(self) -> dict[str, int]:
        """Entries that a stream ever had: what was added and deleted counts, too."""
        streams = sorted([name.decode() async for name in self.redis.scan_iter(_type="stream")])
        return {name: (await self.redis.xinfo_stream(name))["entries-added"] for name in streams}


def in_order(reading: Any) -> Any:
    """The order of a hash is not up to us."""
    return [(key, in_order(reading[key])) for key in sorted(reading)] if isinstance(reading, dict) else reading


def normal(*readings: Any) -> str:
    """Without what differs from one time to the next: refs by their order, entry ids and times not at all."""
    text = repr([in_order(one) for one in readings])
    refs = {ref: f"ref-{number}" for number, ref in enumerate(sorted(set(re.findall(REF, text))))}
    text = re.sub(REF, lambda match: refs[match[0]], text)
    return re.sub(r"(?<!\d)\d{13}(\.0)?(?!\d)", "time", re.sub(r"\b\d{13}-\d+", "entry", text))


def spread(count: int) -> list[int]:
    """Points within so many bytes: the first, the last, and some between them."""
    return sorted({round(number * (count - 1) / (POINTS - 1)) for number in range(POINTS)})


@pytest.mark.parametrize("name", VERBS)
async def test_verb_whose_connection_is_cut_is_as_one_that_was_not(
    server: Server, redis: Control, keys: DeploymentKeys, name: str
) -> None:
    with Proxy(server.url) as proxy, server.connect_blocking() as blocking:
        bench, seed = Bench(proxy, redis, blocking, keys), VERBS[name]
        call = await bench.prepare(seed)
        link = await bench.dial()
        sent, received = proxy.sent, proxy.received
        answer = await link.run(call)
        link.close()
        expected = await bench.outcome()
        sent, received = proxy.sent - sent, proxy.received - received

        for cut, count in [(proxy.cut_after_sent, sent), (proxy.cut_after_received, received)]:
            for after in spread(count):
                again = await lose_and_repeat(bench, seed, partial(cut, after))
                where = f"{name}, {cut.__name__}({after}) of {count}"
                assert await bench.outcome() == expected, where
                assert normal(again) == normal(answer) or name not in SAME_ANSWER, where

        call = await bench.prepare(seed)
        async with open_control(bench.settings, "through") as client:  # which sends again of itself
            await client.ping()
            proxy.drop_reply()
            await run(client, call)
        assert proxy.cuts == len(spread(sent)) + len(spread(received)) + 1
        assert await bench.outcome() == expected, f"{name}, with redis-py"
        await redis.flushall()


async def lose_and_repeat(bench: Bench, seed: Seed, cut: Callable[[], None]) -> Any:
    """Send a verb into a connection that will be cut, and again over the next one; what the second time answers."""
    call = await bench.prepare(seed)
    link = await bench.dial()
    cut()
    with pytest.raises(BrokerUnavailableError):
        await link.run(call)
    link = await bench.dial()
    answer = await link.run(call)
    link.close()
    return answer


async def test_what_a_claim_brought_into_a_cut_connection_is_in_the_pending_list_and_nothing_else_is(
    server: Server, redis: Control, keys: DeploymentKeys
) -> None:
    with Proxy(server.url) as proxy:
        await deploy_config(redis, keys)
        refs = await seed_queued(redis, keys, 40)
        link = await dial(Settings(proxy.url), "through")
        before = proxy.received
        _, claimed = await link.run(scripts.claim(keys, REPLICA, 1))
        size, heard = proxy.received - before, [claimed]

        for after in spread(size) * 2:
            proxy.cut_after_received(after)
            with pytest.raises(BrokerUnavailableError):
                await link.run(scripts.claim(keys, REPLICA, 1))
            link = await dial(
                Settings(proxy.url), "through"
            )  # and look for what has come, as a replica does (Intake.reconcile)
            heard.append(await link.ask("XREADGROUP", "GROUP", GROUP, REPLICA, "STREAMS", keys.lane("normal"), "0"))
        link.close()

        held = [fields[fields.index(b"ref") + 1].decode() for _, entries in heard[-1] for _, fields in entries]
        assert held == refs[: len(heard)]
        assert [one.ref for one in await claim(redis, keys, 40, replica="r-2")] == refs[len(heard) :]
        await redis.flushall()
