"""Streams of requests that run again, and their large items."""

import asyncio
import pickle
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest

from millstream.broker import scripts
from millstream.broker.cluster import dial_everywhere
from millstream.broker.connection import run
from millstream.errors import MillstreamError
from tests.helpers import claim, open_inbox, wait_until
from tests.replicas.streams import LARGE, Bench, counting

pytestmark = pytest.mark.anyio


# attempts


async def second_attempt(bench: Bench) -> None:
    """The replica has died; its request runs on another one."""
    await run(bench.redis, scripts.release(bench.keys, "normal", "r-1", "died", expired=False))
    (bench.one,) = await claim(bench.redis, bench.keys, replica="r-2")


async def test_late_attempt_is_stopped(bench: Bench) -> None:
    closed = asyncio.Event()

    async def generate() -> AsyncIterator[int]:
        try:
            yield 0
            await asyncio.sleep(0.01)
            yield 1
            await asyncio.sleep(60)
        finally:
            closed.set()

    late = bench.one
    await second_attempt(bench)
    producing = bench.start_producing(generate, one=late)
    await wait_until(lambda: bench.stale > 0)
    producing.cancel()
    await asyncio.wait([producing])

    assert closed.is_set()
    assert await bench.numbers() == []


async def test_next_attempt_does_not_make_again_what_is_there(bench: Bench) -> None:
    await bench.produce(counting(5), 10)
    await bench.holds(5)
    await second_attempt(bench)

    emitter = bench.open(10)
    await emitter.go_on()
    made = [emitter.seal(f"again {number}") for number in range(3)]
    emitter.close()

    assert made == [b"", b"", b""]


async def test_next_attempt_goes_on_after_what_is_there(bench: Bench) -> None:
    async with open_inbox(bench.redis, bench.keys) as inbox:
        await bench.produce(counting(5), 10)
        await bench.holds(5)
        while not (await inbox.take())[bench.one.ref].startswith(b"item 4\n"):
            pass
        await second_attempt(bench)

        assert await bench.produce_next_attempt(counting(8)) == 8

        await bench.holds(8)
        assert int((await inbox.take())[bench.one.ref].partition(b"\n")[0][5:]) >= 5
    assert await bench.items() == list(range(8))


@pytest.mark.parametrize("read", [1, 3, 5])
async def test_next_attempt_knows_how_far_the_reader_is(bench: Bench, read: int) -> None:
    await bench.produce(counting(5), 10)
    await bench.holds(5)
    await bench.consume(read)
    await second_attempt(bench)

    producing = asyncio.create_task(bench.produce_next_attempt(counting(100), 6))

    await wait_until(lambda: bench.emitter.count == read + 6)
    await asyncio.sleep(0.02)
    assert bench.emitter.count == read + 6
    producing.cancel()


async def test_next_attempt_of_what_has_made_nothing_starts_at_the_beginning(bench: Bench) -> None:
    await second_attempt(bench)

    assert await bench.produce_next_attempt(counting(3)) == 3

    await bench.holds(3)


# large items


async def large_and_small() -> AsyncIterator[Any]:
    yield b"a" * LARGE
    yield "small"
    yield b"b" * LARGE


async def test_large_items_lie_in_keys_of_their_own(bench: Bench) -> None:
    await bench.produce(large_and_small)
    await bench.holds(3)

    rows: Any = await bench.redis.xrange(bench.keys.items(bench.one.ref))

    size, part = rows[0][1][b"item"].split()
    assert int(size[1:]) > LARGE
    assert part.decode() == bench.part(0)
    assert await bench.values() == [bench.part(0), bench.part(2)]
    assert 0 < await bench.redis.ttl(bench.keys.value(bench.one.ref, bench.part(0))) <= 60


async def test_value_of_an_item_that_was_read_is_deleted(bench: Bench) -> None:
    await bench.produce(large_and_small)
    await bench.holds(3)

    await bench.consume(1, [bench.part(0)])

    assert await bench.values() == [bench.part(2)]


async def test_large_item_that_is_repeated_after_it_was_read_is_no_error(bench: Bench) -> None:
    """Its acknowledgement was lost; meanwhile it was read, and its value is gone."""
    await bench.produce(large_and_small)
    await bench.holds(3)
    rows: Any = await bench.redis.xrange(bench.keys.items(bench.one.ref))
    await bench.consume(1, [bench.part(0)])

    place = f"{bench.one.lane} {bench.one.entry.decode()}"
    call = scripts.emit(bench.keys, bench.one.ref, place, b"", 60, 0, [fields[b"item"] for _, fields in rows])

    assert await run(bench.redis, call) == (True, 0)
    assert await bench.numbers() == [1, 2]


async def test_large_item_whose_value_was_lost_fails_the_stream(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    write = bench.large.write_item

    async def write_and_lose(*arguments: Any) -> bytes:
        envelope = await write(*arguments)
        await bench.redis.delete(bench.keys.value(bench.one.ref, bench.part(0)))
        return envelope

    monkeypatch.setattr(bench.large, "write_item", write_and_lose)

    async def generate() -> AsyncIterator[Any]:
        yield b"a" * LARGE
        await asyncio.sleep(0.05)
        yield "next"

    with pytest.raises(MillstreamError, match="MISSING the value of item 0"):
        await bench.produce(generate)
    assert await bench.numbers() == []


async def test_value_that_was_never_announced_is_deleted_when_the_stream_is_closed(bench: Bench) -> None:
    bench.links[0].close()  # nothing can be announced
    producing = bench.start_producing(large_and_small)
    await asyncio.wait([producing])
    assert await bench.values() == [bench.part(0), bench.part(2)]
    bench.emitters.link = await dial_everywhere(bench.settings, "test-writes")
    bench.links.append(bench.emitters.link)

    bench.emitter.close()

    async def is_empty() -> bool:
        return await bench.values() == []

    await wait_until(is_empty)


async def test_generator_may_change_an_array_that_it_has_yielded(bench: Bench) -> None:
    array = bytearray(LARGE)

    async def generate() -> AsyncIterator[Any]:
        for number in range(3):
            array[:] = bytes([number]) * LARGE
            yield pickle.PickleBuffer(array)

    await bench.produce(generate)
    await bench.holds(3)

    rows: Any = await bench.redis.xrange(bench.keys.items(bench.one.ref))
    for number, (_, fields) in enumerate(rows):
        size = int(fields[b"item"].split()[0][1:])
        key, opening = bench.keys.value(bench.one.ref, bench.part(number)), bench.codec.opening
        item = await bench.large._bulk.read(key, size, partial(opening, "item", bench.one.ref.encode(), b"%d" % number))
        assert item is not None
        assert bytes(item.load()) == bytes([number]) * LARGE
