"""Real processes killed at the worst moment: what they held, had half sent, or had been promised."""

import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import Process
from anyio.streams.text import TextReceiveStream

from millstream.broker import control_scripts, scripts
from millstream.broker.call import script
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.link import dial
from millstream.broker.scripts import Ended, Finished, Submitted
from millstream.broker.states import State
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError
from tests.broker.actors import (
    BATCH,
    block,
    claim_and_hang,
    emit_endlessly,
    finish_one_by_one,
    submit_endlessly,
    write_and_finish,
)
from tests.helpers import (
    CALLER,
    REPLICA,
    asking,
    cancel,
    claim,
    deploy_config,
    emit,
    finish,
    new_ref,
    node_of,
    read_everything,
    read_state,
    read_states,
    request,
    seed_delayed,
    seed_parked,
    seed_queued,
    seed_running,
    wait_until,
)
from tests.leaks import find_leaks, find_lost, take_snapshot
from tests.servers import Server

pytestmark = [pytest.mark.anyio, pytest.mark.processes]

ROOT = Path(__file__).parent.parent.parent
AOF = ("--appendonly", "yes", "--appendfsync", "always")


@asynccontextmanager
async def acting(part: Callable[..., Awaitable[None]], url: str) -> AsyncIterator[Process]:
    """A process that plays a part of `actors`. It is killed at the latest when the test is over."""
    command = [sys.executable, "-m", "tests.broker.actors", part.__name__, url]
    async with await anyio.open_process(command, cwd=ROOT, stderr=None) as process:
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()


async def next_line(process: Process) -> str:
    assert process.stdout is not None
    with anyio.fail_after(20):
        return (await TextReceiveStream(process.stdout).receive()).strip()


async def kill(process: Process, redis: Control) -> None:
    """SIGKILL, and wait until the server has noticed."""
    process.kill()
    await process.wait()

    async def is_gone() -> bool:
        clients: Any = await redis.client_list()
        return not any(client["name"] == "actor" for client in clients)

    await wait_until(is_gone)


async def release_all(redis: Control, keys: DeploymentKeys, *, expired: bool = False) -> int:
    requeued = 0
    for lane in ("returned", "high", "normal", "low"):
        more = True
        while more:
            released = await run(redis, scripts.release(keys, lane, REPLICA, "killed", expired=expired))
            requeued, more = requeued + released.requeued, released.more
    return requeued


# replicas


async def test_what_a_killed_replica_had_taken_is_finished_by_another(
    server: Server, redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    refs = await seed_queued(redis, keys, 3)
    async with acting(claim_and_hang, server.url) as replica:
        await next_line(replica)
        taken = await read_states(redis, keys, refs)
        await kill(replica, redis)

    requeued = await release_all(redis, keys)
    attempts = await claim(redis, keys, 5, replica="r-2")
    refused, _ = await finish(redis, keys, *attempts)

    assert (taken, requeued, refused) == ([State.RUNNING] * 3, 3, {})
    assert [one.ref for one in attempts] == refs
    assert [one.fields[b"attempt"] for one in attempts] == [b"2"] * 3
    assert await read_states(redis, keys, refs) == [State.SUCCEEDED] * 3


async def test_killed_replica_without_launcher_is_found_by_its_lease(
    server: Server, redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    (ref,) = await seed_queued(redis, keys)
    await run(redis, control_scripts.renew([keys.lease(REPLICA)], 60, "launcher"))
    async with acting(claim_and_hang, server.url) as replica:
        await next_line(replica)
        await kill(replica, redis)
    while_leased = await run(redis, control_scripts.sweep(keys)), await release_all(redis, keys, expired=True)
    await redis.pexpire(keys.lease(REPLICA), 0)

    swept = await run(redis, control_scripts.sweep(keys))
    requeued = await release_all(redis, keys, expired=True)

    assert (while_leased[0].without_lease, while_leased[1]) == ([], 0)
    assert (swept.without_lease, requeued) == ([REPLICA], 1)
    assert await read_state(redis, keys, ref) == State.QUEUED


async def test_replica_killed_while_it_finishes_leaves_each_request_finished_or_running(
    server: Server, redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    refs = await seed_queued(redis, keys, 1500)

    async def has_begun() -> bool:
        return await redis.hlen(keys.open) < 1450

    async with acting(finish_one_by_one, server.url) as replica:
        await wait_until(has_begun)
        await kill(replica, redis)

    finished = 1500 - await redis.hlen(keys.open)
    requeued = await release_all(redis, keys)
    attempts = await claim(redis, keys, 1500, replica="r-2")
    refused, _ = await finish(redis, keys, *attempts, value=b"of the second replica")

    stored: Any = await redis.mget([keys.result(ref) for ref in refs])
    values = [one.partition(b"\n")[2] for one in stored]
    assert finished > 0 and finished + requeued == 1500
    assert refused == {}
    assert values == [b"of the killed replica"] * finished + [b"of the second replica"] * requeued


async def test_replica_killed_while_it_finishes_with_large_values_leaves_no_result_without_its_value(
    server: Server, redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    refs = await seed_queued(redis, keys, 1000)

    async def has_begun() -> bool:
        return await redis.hlen(keys.open) < 950

    async with acting(write_and_finish, server.url) as replica:
        await wait_until(has_begun, timeout_s=20)
        await kill(replica, redis)

    results: Any = [(ref, await redis.get(keys.result(ref))) for ref in refs]
    ended = [(ref, stored.partition(b"\n")[0].split()[2]) for ref, stored in results if stored is not None]
    sizes = [await redis.strlen(keys.value(ref, entry.decode())) for ref, entry in ended]
    assert len(ended) > 50 and sizes == [10_000] * len(ended)
    assert await release_all(redis, keys) == 1000 - len(ended)


async def test_stream_whose_replica_is_killed_goes_on_without_a_gap_or_a_change(
    server: Server, redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    (ref,) = await seed_queued(redis, keys, extras=asking(stream=1000))

    async def has_begun() -> bool:
        return await redis.xlen(keys.items(ref)) > 5 * BATCH

    async with acting(emit_endlessly, server.url) as replica:
        await wait_until(has_begun, timeout_s=20)
        await run(redis, scripts.consume(keys, ref, BATCH + 7))
        await kill(replica, redis)
    await release_all(redis, keys)
    (second,) = await claim(redis, keys, replica="r-2")
    left = await redis.xlen(keys.items(ref))
    read = BATCH + 7
    again = read + left + BATCH  # so many items the second attempt produces

    for first in range(0, again, BATCH):
        items = [b"second %d" % number for number in range(first, min(first + BATCH, again))]
        await emit(redis, keys, second, first, *items)

    rows: Any = await redis.xrange(keys.items(ref))
    expected = [b"first %d" % number for number in range(read, read + left)]
    expected += [b"second %d" % number for number in range(read + left, again)]
    assert left > 0
    assert [fields[b"item"] for _, fields in rows] == expected


async def test_frozen_replica_takes_nothing_once_its_connection_is_cut(
    server: Server, redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    async with acting(block, server.url) as replica:
        client_id = await next_line(replica)
        replica.send_signal(signal.SIGSTOP)
        (ghostly,) = await seed_queued(redis, keys)
        taken = await read_state(redis, keys, ghostly)  # by a process that will never run it

        await (await node_of(redis, keys.prefix)).client_kill_filter(_id=client_id)
        requeued = await release_all(redis, keys)
        (later,) = await seed_queued(redis, keys)

        assert (taken, requeued) == (State.RUNNING, 1)
        assert await read_states(redis, keys, [ghostly, later]) == [State.QUEUED] * 2


# callers


async def test_submitter_killed_in_mid_batch_leaves_each_request_queued_or_unknown(
    server: Server, redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)

    async def has_begun() -> bool:
        return await redis.hlen(keys.open) > 10 * BATCH

    async with acting(submit_endlessly, server.url) as submitter:
        await wait_until(has_begun, timeout_s=20)
        await kill(submitter, redis)

    count = await redis.hlen(keys.open)
    refs = [f"{number:022d}" for number in range(1, count + BATCH + 1)]
    known: Any = await redis.hmget(keys.open, refs)
    repeated = await run(redis, scripts.submit(keys, "", [part for ref in refs[-100:] for part in request(ref)]))
    assert count % BATCH == 0
    assert [place is not None for place in known] == [True] * count + [False] * BATCH
    assert repeated == dict.fromkeys(range(100 - BATCH), Submitted.OPEN)
    assert await redis.xlen(keys.lane("normal")) == count + BATCH


# the server


async def test_restarted_server_has_every_request_where_it_was(
    start_server: Callable[..., Server], keys: DeploymentKeys
) -> None:
    server = start_server(*AOF)
    async with server.connect() as redis:
        await deploy_config(redis, keys)
        ended, running, released = await seed_running(redis, keys, 3)
        await finish(redis, keys, ended)
        await run(redis, scripts.hand_back(keys, "normal", "normal", [released.entry]))
        parked, delayed = await seed_parked(redis, keys), await seed_delayed(redis, keys)

        server.kill()
        server.start()

        refs = [ended.ref, running.ref, released.ref, parked, delayed]
        assert await read_states(redis, keys, refs) == [
            State.SUCCEEDED,
            State.RUNNING,
            State.QUEUED,
            State.PARKED,
            State.DELAYED,
        ]
        assert await redis.script_exists(script("finish").sha.decode()) == [False]
    assert_consistent(server)


async def test_restarted_server_has_deadlines_large_values_and_items_where_they_were(
    start_server: Callable[..., Server], keys: DeploymentKeys
) -> None:
    server = start_server(*AOF)
    async with server.connect() as redis:
        await deploy_config(redis, keys, max_queued=10)
        ref, upstream = new_ref(), "up.Up~" + "u" * 22
        await redis.set(keys.payload(ref), b"large arguments", px=600_000)
        extras = asking(payload=True, timeout_ms=3_600_000, stream=4)
        call = scripts.hold(keys, CALLER, ref.encode(), "low", b"m", b"", extras=extras.encode(), depends_on=[upstream])
        await run(redis, call)
        await run(
            redis, scripts.supply(keys, ref, upstream, b"succeeded normal 1-1\n@9", [keys.value("u" * 22, "1-1")])
        )
        (one,) = await claim(redis, keys)
        await emit(redis, keys, one, 0, b"a", b"b")
        await run(redis, scripts.consume(keys, ref, 2))
        before = await read_everything(redis)

        server.kill()
        server.start()

        assert await read_everything(redis) == before
        assert await redis.pttl(keys.payload(ref)) == -1
        assert await emit(redis, keys, one, 0) == (True, 2)
        await redis.zadd(keys.deadlines, {ref: 1})
        assert await cancel(redis, keys, ref, overdue=True) == [Ended.ENDED]
        assert not await redis.exists(keys.payload(ref), keys.holds, keys.deadlines, keys.notes)
    assert_consistent(server)


async def test_replica_finishes_over_a_restart_of_the_server(
    start_server: Callable[..., Server], keys: DeploymentKeys
) -> None:
    server = start_server(*AOF)
    async with server.connect() as redis:
        await deploy_config(redis, keys)
        mine, others = await seed_running(redis, keys, 2)
        server.kill()
        server.start()

        link = await dial(Settings(server.url), "replica")
        call = scripts.finish(keys, "normal", 60, (mine.entry, mine.ref, CALLER, "succeeded", b"value"))
        first, again = await link.run(call), await link.run(call)
        requeued = await release_all(redis, keys)
        link.close()

        assert (first, again) == (({}, []), ({0: Finished.DONE}, []))
        assert requeued == 1
        assert await read_states(redis, keys, [mine.ref, others.ref]) == [State.SUCCEEDED, State.QUEUED]
    assert_consistent(server)


async def test_every_acknowledged_request_outlives_the_death_of_the_server(
    start_server: Callable[..., Server], keys: DeploymentKeys
) -> None:
    server = start_server(*AOF)
    refs = [new_ref() for _ in range(1000)]
    async with server.connect() as redis:
        await deploy_config(redis, keys)
        link = await dial(Settings(server.url), "caller")
        answers = [link.run(scripts.submit(keys, CALLER, request(ref))) for ref in refs]
        await answers[200]

        server.kill()
        await link.lost
        acknowledged = [ref for ref, answer in zip(refs, answers, strict=True) if answer.exception() is None]
        unknown = [answer.exception() for answer in answers[len(acknowledged) :]]
        server.start()

        assert len(acknowledged) > 200 and acknowledged == refs[: len(acknowledged)]
        assert {type(error) for error in unknown} <= {BrokerUnavailableError}
        assert None not in await redis.hmget(keys.open, acknowledged)
        await run(redis, scripts.submit(keys, CALLER, [part for ref in refs for part in request(ref)]))
        assert sorted(one.ref for one in await claim(redis, keys, 1500)) == refs
    assert_consistent(server)


def assert_consistent(server: Server) -> None:
    with server.connect_blocking() as client:
        snapshot = take_snapshot(client)
    assert find_leaks(snapshot) == find_lost(snapshot) == []
