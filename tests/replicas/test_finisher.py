"""Outcomes on their way to the server: batched, kept until acknowledged, refused where another attempt owns the request."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from millstream.broker import scripts
from millstream.broker.cluster import dial_everywhere
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.link import Link
from millstream.broker.supplying import Supplier
from millstream.config import Settings
from millstream.replicas import finisher as finisher_module
from millstream.replicas.finisher import Finisher
from tests import helpers
from tests.helpers import (
    CALLER,
    REPLICA,
    Claimed,
    deploy_config,
    open_inbox,
    read_result,
    read_state,
    seed_parked,
    seed_running,
    wait_until,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
async def link(settings: Settings, redis: Control, keys: DeploymentKeys) -> AsyncIterator[Link]:
    await deploy_config(redis, keys)
    link = await dial_everywhere(settings, "test-writes")
    yield link
    link.close()
    await link.lost


@pytest.fixture
async def finisher(settings: Settings, keys: DeploymentKeys, link: Link) -> AsyncIterator[Finisher]:
    chores: set[asyncio.Task[Any]] = set()

    def start_chore(chore: Coroutine[Any, Any, None]) -> None:
        chores.add(asyncio.create_task(chore))

    finisher = Finisher(keys, 60, Supplier(settings, link.run), start_chore)
    finisher.link = link
    yield finisher
    if chores:
        await asyncio.wait(chores)


def finish(finisher: Finisher, one: Claimed, value: bytes = b"a value", state: bytes = b"succeeded") -> None:
    finisher.finish(one.lane, one.entry, one.ref.encode(), CALLER.encode(), state, value)


async def script_calls(redis: Control) -> int:
    stats: Any = await redis.info("commandstats")
    counts = [stats[name] for name in ("cmdstat_eval", "cmdstat_evalsha") if name in stats]
    return sum(int(count["calls"]) - int(count.get("failed_calls", 0)) for count in counts)


async def test_outcome_is_stored_and_told_to_the_caller(
    redis: Control, keys: DeploymentKeys, finisher: Finisher
) -> None:
    good, bad = await seed_running(redis, keys, 2)

    async with open_inbox(redis, keys) as inbox:
        finish(finisher, good)
        finish(finisher, bad, b"an error", b"failed")

        told = await inbox.take()

    expected = {
        good.ref: f"succeeded normal {good.entry.decode()}\na value".encode(),
        bad.ref: f"failed normal {bad.entry.decode()}\nan error".encode(),
    }
    assert told == expected
    assert await read_result(redis, keys, bad.ref) == (f"failed normal {bad.entry.decode()}", b"an error")
    await wait_until(lambda: finisher.is_idle)


async def test_outcomes_of_one_pass_go_out_in_one_call_per_lane(
    redis: Control, keys: DeploymentKeys, finisher: Finisher
) -> None:
    claimed = [*await seed_running(redis, keys, 20), *await seed_running(redis, keys, 5, lane="high")]
    await redis.config_resetstat()

    for one in claimed:
        finish(finisher, one)
    await wait_until(lambda: finisher.is_idle)

    assert await script_calls(redis) == 2
    assert {await read_state(redis, keys, one.ref) for one in claimed} == {"succeeded"}


@pytest.mark.parametrize(("name", "value", "calls"), [("AT_ONCE", 8, 3), ("BYTES_AT_ONCE", 50, 4)])
async def test_call_is_bounded_in_number_and_bytes(
    redis: Control, keys: DeploymentKeys, finisher: Finisher, monkeypatch: pytest.MonkeyPatch, name: str, value: int, calls: int
) -> None:  # fmt: skip
    monkeypatch.setattr(finisher_module, name, value)
    claimed = await seed_running(redis, keys, 20)
    await redis.config_resetstat()

    for one in claimed:
        finish(finisher, one, b"10 bytes !")
    await wait_until(lambda: finisher.is_idle)

    assert await script_calls(redis) == calls
    assert {await read_state(redis, keys, one.ref) for one in claimed} == {"succeeded"}


async def test_outcome_goes_out_when_whoever_wanted_to_flush_does_and_not_before(
    redis: Control, keys: DeploymentKeys, finisher: Finisher, settings: Settings
) -> None:
    (one,) = await seed_running(redis, keys)
    other = await dial_everywhere(settings, "test-reads")

    finisher.expect_flush()
    finish(finisher, one)
    await asyncio.sleep(0)
    assert await read_state(redis, keys, one.ref) == "running"
    finisher.flush(other)

    await wait_until(lambda: finisher.is_idle)
    assert await read_state(redis, keys, one.ref) == "succeeded"
    other.close()


async def test_outcome_that_was_lost_with_another_connection_is_sent_again(
    redis: Control, keys: DeploymentKeys, finisher: Finisher, settings: Settings
) -> None:
    (one,) = await seed_running(redis, keys)
    other = await dial_everywhere(settings, "test-reads")

    finisher.expect_flush()
    finish(finisher, one)
    other.hold()
    finisher.flush(other)
    other.close()
    await other.lost
    assert not finisher.is_idle
    assert finisher.link is not None
    finisher.resume(finisher.link)

    await wait_until(lambda: finisher.is_idle)
    assert await read_state(redis, keys, one.ref) == "succeeded"


async def test_outcome_waits_for_a_connection(
    redis: Control, keys: DeploymentKeys, finisher: Finisher, settings: Settings
) -> None:
    (one,) = await seed_running(redis, keys)
    assert finisher.link is not None
    finisher.link.close()
    await finisher.link.lost

    finish(finisher, one)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not finisher.is_idle
    assert finisher.holds("normal", one.entry) and not finisher.holds("high", one.entry)

    again = await dial_everywhere(settings, "again")
    finisher.resume(again)
    await wait_until(lambda: finisher.is_idle)
    assert not finisher.holds("normal", one.entry)
    assert await read_state(redis, keys, one.ref) == "succeeded"
    again.close()


async def test_outcome_whose_acknowledgement_was_lost_is_sent_again_and_recognised(
    redis: Control, keys: DeploymentKeys, finisher: Finisher, caplog: pytest.LogCaptureFixture
) -> None:
    (one,) = await seed_running(redis, keys)
    await helpers.finish(redis, keys, one, value=b"a value")  # it arrived; its reply did not

    finish(finisher, one)
    await wait_until(lambda: finisher.is_idle)

    assert caplog.records == []
    assert await read_result(redis, keys, one.ref) == (f"succeeded normal {one.entry.decode()}", b"a value")


async def test_late_finisher_is_told_stale_and_says_so(
    redis: Control, keys: DeploymentKeys, finisher: Finisher, caplog: pytest.LogCaptureFixture
) -> None:
    (one,) = await seed_running(redis, keys)
    await run(redis, scripts.release(keys, "normal", REPLICA, "died", expired=False))

    finish(finisher, one)
    await wait_until(lambda: finisher.is_idle)

    assert await read_result(redis, keys, one.ref) is None
    assert await read_state(redis, keys, one.ref) == "queued"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{keys.tag}~{one.ref} was taken over while it ran here" in record.getMessage()


async def test_outcome_that_the_server_refuses_is_kept_and_sent_again(
    redis: Control, keys: DeploymentKeys, finisher: Finisher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    monkeypatch.setattr(finisher_module, "RETRY_S", 0.02)
    (one,) = await seed_running(redis, keys)
    await redis.rename(keys.open, f"{keys.prefix}aside")
    await redis.set(keys.open, "no hash")

    finish(finisher, one)
    await wait_until(lambda: any("will be tried again" in record.getMessage() for record in caplog.records))
    assert not finisher.is_idle

    await redis.rename(f"{keys.prefix}aside", keys.open)
    await wait_until(lambda: finisher.is_idle)
    assert await read_state(redis, keys, one.ref) == "succeeded"


async def test_notice_is_told_to_the_caller(redis: Control, keys: DeploymentKeys, finisher: Finisher) -> None:
    one, other = await seed_running(redis, keys, 2)

    async with open_inbox(redis, keys) as inbox, open_inbox(redis, keys, "other") as second:
        finisher.notice(one.ref.encode(), CALLER.encode(), b"normal " + one.entry)
        finisher.notice(other.ref.encode(), b"other", b"normal " + other.entry)

        assert await inbox.take() == {one.ref: f"running normal {one.entry.decode()}\n".encode()}
        assert await second.take() == {other.ref: f"running normal {other.entry.decode()}\n".encode()}


async def test_result_takes_the_place_of_the_notice(redis: Control, keys: DeploymentKeys, finisher: Finisher) -> None:
    (one,) = await seed_running(redis, keys)

    async with open_inbox(redis, keys) as inbox:
        finisher.notice(one.ref.encode(), CALLER.encode(), b"normal " + one.entry)
        finish(finisher, one)

        assert (await inbox.take())[one.ref].startswith(b"succeeded")
        assert await inbox.is_empty()


async def test_value_goes_to_the_requests_that_wait_for_it(
    redis: Control, keys: DeploymentKeys, finisher: Finisher
) -> None:
    (one,) = await seed_running(redis, keys)
    ref_id = f"{keys.tag}~{one.ref}"
    waiter = await seed_parked(redis, keys, ref_id)
    await run(redis, scripts.watch(keys, "waiters", f"{keys.tag}~{waiter}", [one.ref]))

    finish(finisher, one)

    async def is_queued() -> bool:
        place: Any = await redis.hget(keys.open, waiter)
        return bool(place.startswith(b"normal"))

    await wait_until(is_queued)
    entries: Any = await redis.xrange(keys.lane("normal"))
    ((_, fields),) = entries
    assert fields[b"dep:" + ref_id.encode()] == f"succeeded normal {one.entry.decode()}\na value".encode()
