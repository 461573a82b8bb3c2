"""The producing half of a stream: items in order, no more ahead of the reader than allowed, and nothing twice."""

import asyncio
import json
import pickle
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from millstream.broker import scripts
from millstream.broker.call import script
from millstream.errors import SerializationError
from millstream.replicas import streaming
from tests.helpers import open_inbox, wait_until
from tests.replica_helpers import Gate
from tests.replicas.streams import BOTH, LARGE, Bench, Counting, counting

pytestmark = pytest.mark.anyio


# items as they are made


@BOTH
async def test_items_are_stored_in_their_order(bench: Bench, counting: Counting) -> None:
    assert await bench.produce(counting(10)) == 10

    await bench.holds(10)
    assert await bench.items() == list(range(10))


@BOTH
async def test_reader_is_told_of_items_in_their_order(bench: Bench, counting: Counting) -> None:
    async with open_inbox(bench.redis, bench.keys) as inbox:
        await bench.produce(counting(1))

        stored = (await inbox.take())[bench.one.ref]

    head, _, rest = stored.partition(b"\n")
    assert head == b"item 0"
    assert bench.codec.open("item", bench.one.ref.encode(), rest[:-1], b"0") == 0


async def test_item_is_stored_before_the_next_one_is_made(bench: Bench) -> None:
    gate = Gate()

    async def generate() -> AsyncIterator[str]:
        yield "first"
        await gate.wait()
        yield "second"

    producing = bench.start_producing(generate)

    await bench.holds(1)
    assert await bench.items() == ["first"]
    gate.open()
    assert await producing == 2


async def test_generator_that_never_waits_lets_its_items_go_one_by_one(bench: Bench) -> None:
    """It computes, and does not await: the loop is its own between two items."""
    sent = []

    async def generate() -> AsyncIterator[int]:
        for number in range(3):
            if number:
                time.sleep(0.02)  # noqa: ASYNC251 - that is the point
                sent.append(bench.emitter._sent_ever)
            yield number

    await bench.produce(generate)

    assert sent == [1, 2]


async def test_generator_that_never_waits_lets_others_run(bench: Bench) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    ticking = asyncio.create_task(tick())

    await bench.produce(counting(20_000), 100_000)

    ticking.cancel()
    assert ticks > 10


async def test_many_items_go_out_in_few_calls(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sizes_of_calls(monkeypatch)

    await bench.produce(counting(5000), 10_000)
    await bench.holds(5000)

    assert sum(sizes) == 5000
    assert max(sizes) == streaming.AT_ONCE
    assert len(sizes) < 500


def sizes_of_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    emit = scripts.emit

    def counted(*arguments: Any) -> Any:
        sizes.append(len(arguments[-1]))
        return emit(*arguments)

    monkeypatch.setattr(scripts, "emit", counted)
    return sizes


async def test_large_batches_are_cut_by_bytes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sizes_of_calls(monkeypatch)

    async def generate() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 50_000

    await bench.produce(generate, 100)
    await bench.holds(40)

    assert max(sizes) * 50_000 <= streaming.BYTES_AT_ONCE


async def test_items_too_large_for_a_message_are_announced(bench: Bench) -> None:
    async def generate() -> AsyncIterator[bytes]:
        yield b"x" * 5000

    async with open_inbox(bench.redis, bench.keys) as inbox:
        await bench.produce(generate)

        assert await inbox.take() == {bench.one.ref: b"item 0\n"}


async def test_items_for_a_caller_in_another_language_are_json(bench: Bench) -> None:
    async def generate() -> AsyncIterator[Any]:
        yield {"n": 1}

    await bench.produce(generate, json=True)
    await bench.holds(1)

    rows: Any = await bench.redis.xrange(bench.keys.items(bench.one.ref))
    assert json.loads(rows[0][1][b"item"][18:]) == {"n": 1}
    assert await bench.items() == [{"n": 1}]


async def test_item_that_is_no_json_is_an_error_for_such_a_caller(bench: Bench) -> None:
    async def generate() -> AsyncIterator[Any]:
        yield 1
        yield object()

    with pytest.raises(SerializationError, match=r"item 1 of a stream of app.Model cannot be written as JSON"):
        await bench.produce(generate, json=True)


# no more ahead than allowed


@BOTH
@pytest.mark.parametrize("max_ahead", [1, 2, 3, 64])
async def test_never_more_items_are_unread_than_allowed(bench: Bench, counting: Counting, max_ahead: int) -> None:
    producing = bench.start_producing(counting(10_000), max_ahead)

    for read in (0, 1, 2, 10):
        bench.emitter.was_read(read)
        await wait_until(lambda read=read: bench.emitter.count == read + max_ahead)
        await asyncio.sleep(0.02)
        assert bench.emitter.count == read + max_ahead

    bench.emitters.close((bench.one.lane, bench.one.entry))
    with pytest.raises(asyncio.CancelledError):
        await producing


async def test_what_a_slow_reader_leaves_unread_is_bounded_while_the_server_is_away(bench: Bench) -> None:
    bench.links[0].close()
    bench.start_producing(counting(10_000), 50)
    await wait_until(lambda: bench.emitter.count == 50)

    await bench.connect()

    await bench.holds(50)
    assert bench.emitter.count == 50


async def test_looking_finds_out_what_no_order_has_told(bench: Bench) -> None:
    bench.start_producing(counting(20), 5)
    await bench.holds(5)
    await bench.consume(3)
    assert bench.emitter.count == 5

    await bench.emitters.look()

    await wait_until(lambda: bench.emitter.count == 8)


async def test_looking_finds_out_that_all_has_been_read(bench: Bench) -> None:
    """Then the stream on the server is empty, and still says how many there were."""
    producing = bench.start_producing(counting(8), 5)
    await bench.holds(5)
    await bench.consume(5)

    await bench.emitters.look()

    assert await producing == 8


async def test_looking_keeps_what_is_unread(bench: Bench) -> None:
    async def generate() -> AsyncIterator[Any]:
        yield "small"
        yield b"x" * LARGE
        yield "never"

    bench.start_producing(generate, 2)
    await bench.holds(2)
    keys = [bench.keys.items(bench.one.ref), bench.keys.value(bench.one.ref, bench.part(1))]
    for key in keys:
        await bench.redis.pexpire(key, 5000)

    await bench.emitters.look()

    assert [await bench.redis.pttl(key) > 50_000 for key in keys] == [True, True]


LOOKING = {"cmdstat_info", "cmdstat_cluster|slots"}


async def test_of_no_streams_nothing_is_asked(bench: Bench) -> None:
    before: Any = await bench.redis.info("commandstats")

    await bench.emitters.look()

    after: Any = await bench.redis.info("commandstats")
    assert {name for name in after if after[name]["calls"] != before.get(name, {}).get("calls")} <= LOOKING


# connections


async def test_items_made_during_an_outage_go_out_afterwards(bench: Bench) -> None:
    await bench.produce(counting(3))
    await bench.holds(3)
    gate = Gate()

    async def generate() -> AsyncIterator[int]:
        for number in range(5):
            if number == 2:
                await gate.wait()
            yield number

    await bench.redis.delete(bench.keys.items(bench.one.ref))
    producing = bench.start_producing(generate)
    await bench.holds(2)
    bench.links[0].close()
    gate.open()
    await producing

    await bench.connect()

    await bench.holds(5)
    assert await bench.items() == list(range(5))


async def test_items_whose_acknowledgement_was_lost_are_not_there_twice(bench: Bench) -> None:
    async with open_inbox(bench.redis, bench.keys) as inbox:
        gate = Gate()

        async def generate() -> AsyncIterator[int]:
            yield 0
            await gate.wait()
            yield 1

        producing = bench.start_producing(generate)
        await bench.holds(1)
        await inbox.take()
        bench.emitter._acknowledged = 0
        bench.emitter._unacknowledged = [bench.codec.seal("item", bench.one.ref.encode(), pickle.dumps("again"), b"0")]

        await bench.connect()
        await asyncio.sleep(0.05)

        assert await inbox.is_empty()
        assert await bench.items() == [0]
        gate.open()
        await producing
        await bench.holds(2)


@pytest.mark.single_server  # no REPLICAOF in a cluster
async def test_items_that_a_server_cannot_take_now_are_offered_again(bench: Bench) -> None:
    """It was demoted, and answers: no connection is lost, and no new one comes."""
    await bench.redis.replicaof("127.0.0.1", "1")
    await bench.produce(counting(5))
    await asyncio.sleep(0.02)
    assert await bench.numbers() == []

    await bench.redis.replicaof("NO", "ONE")

    await bench.holds(5)
    assert await bench.items() == list(range(5))


async def test_script_is_known_to_the_server_before_the_first_item(bench: Bench) -> None:
    """What a server does not know is sent a second time, later than what followed it: items would be late."""
    await bench.redis.script_flush()

    await bench.connect()
    await bench.links[-1].ask("PING")

    assert await bench.redis.script_exists(script("emit").sha.decode()) == [True]


async def test_stream_is_forgotten_when_all_of_it_is_acknowledged(bench: Bench) -> None:
    await bench.produce(counting(200), 1000)

    await wait_until(lambda: not bench.emitters._emitters)


# readers that are gone


async def alone(bench: Bench, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Items that nobody reads."""
    monkeypatch.setattr(streaming, "READER_GONE_S", 0.05)
    bench.start_producing(counting(100), 3, **options)
    await bench.holds(3)


async def test_stream_whose_reader_is_gone_is_cancelled_after_a_while(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await alone(bench, monkeypatch)

    await bench.emitters.look()
    assert bench.cancelled == []
    await asyncio.sleep(0.06)
    await bench.emitters.look()

    assert bench.cancelled == [(bench.one.ref.encode(), streaming.READER_GONE)]
    await bench.holds(0)


async def test_reader_that_comes_back_in_time_finds_its_stream(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await alone(bench, monkeypatch)

    await bench.emitters.look()
    await asyncio.sleep(0.06)
    async with open_inbox(bench.redis, bench.keys):
        await bench.emitters.look()
    await bench.emitters.look()

    assert bench.cancelled == []


async def test_server_that_does_not_say_who_listens_keeps_all_streams(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await alone(bench, monkeypatch)
    await bench.redis.acl_setuser("default", enabled=True, nopass=True, commands=["+@all", "-pubsub"])
    try:
        for _ in range(3):
            await bench.emitters.look()
            await asyncio.sleep(0.03)
    finally:
        await bench.redis.acl_setuser("default", enabled=True, nopass=True, commands=["+@all"])

    assert bench.cancelled == []
    assert len([line for line in caplog.messages if "does not say who listens" in line]) == 1


async def test_slow_generator_is_given_up_as_well(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not ahead by as much as it may, and nobody will ever read what it has made."""
    monkeypatch.setattr(streaming, "READER_GONE_S", 0.0)

    async def generate() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(60)

    bench.start_producing(generate, 64)
    await bench.holds(1)

    await bench.emitters.look()
    await asyncio.sleep(0.01)
    await bench.emitters.look()

    assert len(bench.cancelled) == 1


async def test_reader_without_a_channel_is_never_taken_for_gone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It polls, as a program in another language may."""
    await alone(bench, monkeypatch, client="")

    await bench.emitters.look()
    await asyncio.sleep(0.06)
    await bench.emitters.look()

    assert bench.cancelled == []
