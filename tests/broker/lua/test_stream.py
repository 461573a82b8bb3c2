"""emit.lua and consume.lua: the items of a streaming request, from its replica to its reader."""

from typing import Any

import pytest

from millstream.broker import scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.link import REFUSED
from tests.helpers import (
    CALLER,
    REPLICA,
    Claimed,
    asking,
    cancel,
    claim,
    deploy_config,
    emit,
    finish,
    new_ref,
    open_inbox,
    open_orders,
    read_everything,
    seed_parked,
    seed_running,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]

STREAMING = asking(stream=4)
STALE = (False, 0)


async def ask(redis: Control, keys: DeploymentKeys, one: Claimed) -> tuple[bool, int]:
    """Whether the request still runs here, and how many items were read."""
    return await emit(redis, keys, one, 0)


async def consume(redis: Control, keys: DeploymentKeys, ref: str, count: Any) -> int:
    return await run(redis, scripts.consume(keys, ref, count))


async def items(redis: Control, keys: DeploymentKeys, ref: str) -> dict[str, bytes]:
    """What is there to be read: entry id -> item."""
    rows: Any = await redis.xrange(keys.items(ref))
    return {entry.decode(): fields[b"item"] for entry, fields in rows}


async def seed_streaming(redis: Control, keys: DeploymentKeys, *produced: bytes, caller: str = CALLER) -> Claimed:
    """A running request that has produced so much."""
    await deploy_config(redis, keys, max_attempts=3)
    (one,) = await seed_running(redis, keys, caller=caller, extras=STREAMING)
    if produced:
        assert await emit(redis, keys, one, 0, *produced, caller=caller) == (True, 0)
    return one


async def take_over(redis: Control, keys: DeploymentKeys, one: Claimed, *, replica: str = "r-2") -> Claimed:
    """The next attempt, after the death of the replica that runs this one."""
    await run(redis, scripts.release(keys, one.lane, REPLICA, "killed", expired=False))
    (second,) = await claim(redis, keys, replica=replica)
    return second


# emit


async def test_items_lie_in_order_under_their_numbers(redis: Control, keys: DeploymentKeys) -> None:
    one = await seed_streaming(redis, keys, b"a", b"b")

    await emit(redis, keys, one, 2, b"\x01p\r\n\x00", b"")

    assert list((await items(redis, keys, one.ref)).items()) == [
        ("1-1", b"a"),
        ("2-1", b"b"),
        ("3-1", b"\x01p\r\n\x00"),
        ("4-1", b""),
    ]


async def test_reader_is_sent_each_item_with_its_number(redis: Control, keys: DeploymentKeys) -> None:
    one = await seed_streaming(redis, keys)
    async with open_inbox(redis, keys) as inbox:
        await emit(redis, keys, one, 0, b"\x01p\r\n\x00a")
        await emit(redis, keys, one, 1, b"b\n", b"c")

        raw = [await inbox.take_raw() for _ in range(2)]
    ref = one.ref.encode()
    assert raw[0] == b"*2\r\n$22\r\n" + ref + b"\r\n$14\r\nitem 0\n\x01p\r\n\x00a\n\r\n"
    assert raw[1] == b"*4\r\n$22\r\n%b\r\n$10\r\nitem 1\nb\n\n\r\n$22\r\n%b\r\n$9\r\nitem 2\nc\n\r\n" % (ref, ref)


async def test_nobody_is_told_where_nobody_wants_to_hear(redis: Control, keys: DeploymentKeys) -> None:
    one = await seed_streaming(redis, keys, caller="")
    async with open_inbox(redis, keys, "") as inbox:
        await emit(redis, keys, one, 0, b"a", caller="")

        assert await inbox.is_empty()
    assert await items(redis, keys, one.ref) == {"1-1": b"a"}


async def test_hundreds_of_items_in_one_call_and_numbers_beyond_a_million(redis: Control, keys: DeploymentKeys) -> None:
    one = await seed_streaming(redis, keys)

    await emit(redis, keys, one, 12_345_678, *[b"x"] * 500)

    entries = list(await items(redis, keys, one.ref))
    assert (len(entries), entries[0], entries[-1]) == (500, "12345679-1", "12346178-1")


async def test_emit_whose_reply_was_lost_is_repeated_without_effect(redis: Control, keys: DeploymentKeys) -> None:
    one = await seed_streaming(redis, keys, b"a", b"b")
    before = await read_everything(redis)
    async with open_inbox(redis, keys) as inbox:
        answer = await emit(redis, keys, one, 0, b"a", b"b")

        assert await inbox.is_empty()
    assert answer == (True, 0)
    assert await read_everything(redis) == before


async def test_repeated_emit_that_goes_further_adds_what_is_new(redis: Control, keys: DeploymentKeys) -> None:
    one = await seed_streaming(redis, keys, b"a", b"b")
    async with open_inbox(redis, keys) as inbox:
        await emit(redis, keys, one, 1, b"b", b"c")

        assert await inbox.take() == {one.ref: b"item 2\nc\n"}
    assert await items(redis, keys, one.ref) == {"1-1": b"a", "2-1": b"b", "3-1": b"c"}


async def test_items_live_for_their_time_from_the_last_one_and_a_minute_at_least(
    redis: Control, keys: DeploymentKeys
) -> None:
    one = await seed_streaming(redis, keys)
    left_ms = []
    for number, ttl_s in enumerate((1, 7200, 0.5, 120.5)):
        await emit(redis, keys, one, number, b"x", ttl_s=ttl_s)
        left_ms.append(await redis.pttl(keys.items(one.ref)))

    assert [round(left / 1000) for left in left_ms] == [60, 7200, 60, 121]


@pytest.mark.parametrize(("ttl_s", "first"), [("soon", 0), (60, "first")])
async def test_numbers_that_make_no_sense_write_nothing(
    redis: Control, keys: DeploymentKeys, ttl_s: Any, first: Any
) -> None:
    one = await seed_streaming(redis, keys)
    before = await read_everything(redis)

    with pytest.raises(REFUSED):
        await emit(redis, keys, one, first, b"a", ttl_s=ttl_s)

    assert await read_everything(redis) == before


async def test_key_that_is_no_stream_is_an_error_and_not_silence(redis: Control, keys: DeploymentKeys) -> None:
    one = await seed_streaming(redis, keys)
    await redis.set(keys.items(one.ref), "not a stream", px=60_000)
    before = await read_everything(redis)

    with pytest.raises(REFUSED, match="WRONGTYPE"):
        await emit(redis, keys, one, 0, b"a", b"b")

    assert await read_everything(redis) == before


async def test_items_that_overtake_others_are_an_error_and_not_a_loss(redis: Control, keys: DeploymentKeys) -> None:
    one = await seed_streaming(redis, keys, b"a", b"b")
    await emit(redis, keys, one, 4, b"e", b"f")
    before = await read_everything(redis)

    for first, produced in ((2, [b"c", b"d"]), (3, [b"d", b"e"]), (1, [b"b", b"c"])):
        with pytest.raises(REFUSED, match="OUTOFORDER item"):
            await emit(redis, keys, one, first, *produced)

    assert await read_everything(redis) == before


# the fence


async def test_replica_that_was_replaced_adds_nothing(redis: Control, keys: DeploymentKeys) -> None:
    late = await seed_streaming(redis, keys, b"a")
    await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))
    while_it_waits = await emit(redis, keys, late, 1, b"of the late one")
    (second,) = await claim(redis, keys, replica="r-2")
    while_it_runs = await emit(redis, keys, late, 1, b"of the late one")

    await emit(redis, keys, second, 1, b"of the second")

    assert while_it_waits == while_it_runs == STALE
    assert await items(redis, keys, late.ref) == {"1-1": b"a", "2-1": b"of the second"}


@pytest.mark.parametrize("how", ["finished", "cancelled", "unknown"])
async def test_what_has_ended_takes_no_more_items(redis: Control, keys: DeploymentKeys, how: str) -> None:
    one = await seed_streaming(redis, keys)
    match how:
        case "finished":
            await finish(redis, keys, one)
        case "cancelled":
            await cancel(redis, keys, one.ref)
        case _:
            one = Claimed(new_ref(), "normal", b"1-1", {})
    before = await read_everything(redis)
    async with open_inbox(redis, keys) as inbox:
        answers = [await emit(redis, keys, one, 0, b"a"), await ask(redis, keys, one)]

        assert await inbox.is_empty()
    assert answers == [STALE, STALE]
    assert await read_everything(redis) == before


async def test_entry_id_is_compared_as_a_whole(redis: Control, keys: DeploymentKeys) -> None:
    one = await seed_streaming(redis, keys)
    shorter = Claimed(one.ref, one.lane, one.entry[:-1], {})

    assert await emit(redis, keys, shorter, 0, b"a") == STALE


# a second attempt


async def test_second_attempt_does_not_replace_what_the_first_has_produced(
    redis: Control, keys: DeploymentKeys
) -> None:
    first = await seed_streaming(redis, keys, b"a of the first", b"b of the first")
    second = await take_over(redis, keys, first)
    async with open_inbox(redis, keys) as inbox:
        for number, item in enumerate((b"a of the second", b"b of the second", b"c of the second")):
            await emit(redis, keys, second, number, item)

        assert await inbox.take() == {first.ref: b"item 2\nc of the second\n"}
        assert await inbox.is_empty()
    assert list((await items(redis, keys, first.ref)).values()) == [
        b"a of the first",
        b"b of the first",
        b"c of the second",
    ]


async def test_second_attempt_does_not_bring_back_what_was_read(redis: Control, keys: DeploymentKeys) -> None:
    first = await seed_streaming(redis, keys, b"a", b"b")
    await consume(redis, keys, first.ref, 2)
    second = await take_over(redis, keys, first)

    before = await ask(redis, keys, second)
    await emit(redis, keys, second, 0, b"a", b"b", b"c")

    assert before == (True, 2)
    assert await items(redis, keys, first.ref) == {"3-1": b"c"}


# asking, and running ahead


async def test_replica_learns_how_many_items_were_read(redis: Control, keys: DeploymentKeys) -> None:
    one = await seed_streaming(redis, keys)
    answers = [await ask(redis, keys, one)]
    await emit(redis, keys, one, 0, b"a", b"b", b"c")

    for count in (0, 1, 3):
        await consume(redis, keys, one.ref, count)
        answers.append(await ask(redis, keys, one))
    await emit(redis, keys, one, 3, b"d")
    answers.append(await ask(redis, keys, one))

    assert answers == [(True, 0), (True, 0), (True, 1), (True, 3), (True, 3)]


async def test_asking_changes_nothing_but_keeps_what_is_not_read_alive(redis: Control, keys: DeploymentKeys) -> None:
    one = await seed_streaming(redis, keys, b"a", b"b")
    await consume(redis, keys, one.ref, 1)
    await redis.pexpire(keys.items(one.ref), 5000)
    before = await read_everything(redis)

    await ask(redis, keys, one)

    assert await read_everything(redis) == before
    assert await redis.pttl(keys.items(one.ref)) > 3_000_000


async def test_replica_that_lost_every_message_learns_that_all_was_read_however_long_ago(
    redis: Control, keys: DeploymentKeys
) -> None:
    """Reader and replica would wait for each other for ever if the last item took the count along."""
    one = await seed_streaming(redis, keys)
    await emit(redis, keys, one, 0, b"a", b"b", ttl_s=1)

    await consume(redis, keys, one.ref, 2)

    assert await items(redis, keys, one.ref) == {}
    assert await redis.pttl(keys.items(one.ref)) > 50_000
    assert await ask(redis, keys, one) == (True, 2)


async def test_stream_that_expired_between_two_items_goes_on_by_its_numbers(
    redis: Control, keys: DeploymentKeys
) -> None:
    one = await seed_streaming(redis, keys, b"a", b"b")
    await redis.delete(keys.items(one.ref))

    await emit(redis, keys, one, 2, b"c")

    assert await items(redis, keys, one.ref) == {"3-1": b"c"}
    assert await ask(redis, keys, one) == (True, 2)


# consume


async def test_items_that_were_read_go_and_the_replica_is_told(redis: Control, keys: DeploymentKeys) -> None:
    one = await seed_streaming(redis, keys, b"a", b"b", b"c")
    async with open_orders(redis, keys) as orders:
        removed = await consume(redis, keys, one.ref, 2)

        assert await orders.take_raw() == b"read normal " + one.entry + b" 2"
    assert removed == 2
    assert await items(redis, keys, one.ref) == {"3-1": b"c"}


async def test_consume_whose_reply_was_lost_is_repeated_without_effect(redis: Control, keys: DeploymentKeys) -> None:
    one = await seed_streaming(redis, keys, b"a", b"b", b"c")
    await consume(redis, keys, one.ref, 2)
    before = await read_everything(redis)
    async with open_orders(redis, keys) as orders:
        removed = [await consume(redis, keys, one.ref, count) for count in (2, 1)]

        assert [await orders.take_raw() for _ in removed] == [
            b"read normal " + one.entry + b" 2",
            b"read normal " + one.entry + b" 1",
        ]
    assert removed == [0, 0]
    assert await read_everything(redis) == before


async def test_replica_of_the_second_attempt_is_told(redis: Control, keys: DeploymentKeys) -> None:
    first = await seed_streaming(redis, keys, b"a")
    second = await take_over(redis, keys, first)
    async with open_orders(redis, keys) as late, open_orders(redis, keys, "r-2") as orders:
        await consume(redis, keys, first.ref, 1)

        assert await orders.take_raw() == b"read returned " + second.entry + b" 1"
        assert await late.is_empty()


@pytest.mark.parametrize("how", ["waits", "finished", "parked", "unknown"])
async def test_no_replica_is_told_where_none_runs_it(redis: Control, keys: DeploymentKeys, how: str) -> None:
    one = await seed_streaming(redis, keys, b"a", b"b")
    ref = one.ref
    match how:
        case "waits":
            await run(redis, scripts.hand_back(keys, "normal", "normal", [one.entry]))
        case "finished":
            await finish(redis, keys, one)
        case "parked":
            ref = await seed_parked(redis, keys, extras=STREAMING)
        case _:
            ref = new_ref()
    async with open_orders(redis, keys) as orders:
        removed = await consume(redis, keys, ref, 1)

        assert await orders.is_empty()
    assert removed == (1 if ref == one.ref else 0)


async def test_what_is_left_of_an_ended_stream_can_be_read_until_it_expires(
    redis: Control, keys: DeploymentKeys
) -> None:
    one = await seed_streaming(redis, keys, b"a", b"b")
    await finish(redis, keys, one)

    await consume(redis, keys, one.ref, 1)

    assert await items(redis, keys, one.ref) == {"2-1": b"b"}
    assert 0 < await redis.pttl(keys.items(one.ref)) <= 3_600_000


async def test_lane_that_lost_its_group_stops_no_reader(redis: Control, keys: DeploymentKeys) -> None:
    one = await seed_streaming(redis, keys, b"a")
    await redis.xgroup_destroy(keys.lane("normal"), "replicas")

    assert await consume(redis, keys, one.ref, 1) == 1


@pytest.mark.parametrize("count", ["many", "", -5, "nan"])
async def test_count_that_makes_no_sense_removes_nothing(redis: Control, keys: DeploymentKeys, count: Any) -> None:
    one = await seed_streaming(redis, keys, b"a")
    before = await read_everything(redis)

    with pytest.raises(REFUSED):
        await consume(redis, keys, one.ref, count)

    assert await read_everything(redis) == before
