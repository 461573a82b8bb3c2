"""finish.lua, with ending.lua: running -> succeeded | failed, fenced; and who is told."""

import json

import pytest
from redis.exceptions import ResponseError

from millstream.broker import scripts
from millstream.broker.call import Call
from millstream.broker.connection import Control, run
from millstream.broker.keys import GROUP, DeploymentKeys
from millstream.broker.scripts import Finished, Waiter
from millstream.broker.states import State
from tests.helpers import (
    CALLER,
    Claimed,
    claim,
    deploy_config,
    finish,
    new_ref,
    open_inbox,
    read_everything,
    read_result,
    read_state,
    read_states,
    seed_running,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]


async def release(redis: Control, keys: DeploymentKeys, one: Claimed, replica: str = "r-1") -> None:
    await run(redis, scripts.release(keys, one.lane, replica, "killed", expired=False))


@pytest.mark.parametrize("is_alone", [True, False])  # the script has a short way for one without others
@pytest.mark.parametrize("state", ["succeeded", "failed"])
async def test_outcome_is_stored_for_its_time_and_nothing_else_is_left(
    redis: Control, keys: DeploymentKeys, state: str, is_alone: bool
) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    if not is_alone:
        await redis.hset(keys.notes, f"{new_ref()}:readers", "somebody")

    async with open_inbox(redis, keys) as inbox:
        answer = await finish(redis, keys, one, state=state, value=b"\x01p\r\n\x00value", ttl_s=7)
        told = await inbox.take()

    await redis.delete(keys.notes)
    assert answer == ({}, [])
    assert told == {one.ref: f"{state} normal {one.entry.decode()}\n".encode() + b"\x01p\r\n\x00value"}
    assert await read_result(redis, keys, one.ref) == (f"{state} normal {one.entry.decode()}", b"\x01p\r\n\x00value")
    assert 0 < await redis.pttl(keys.result(one.ref)) <= 7000
    assert await redis.hlen(keys.open) == await redis.xlen(keys.lane("normal")) == 0
    assert (await redis.xpending(keys.lane("normal"), GROUP))["pending"] == 0


async def test_batch_ends_all_of_its_requests(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    attempts = await seed_running(redis, keys, 200)

    await finish(redis, keys, *attempts[:150])

    states = await read_states(redis, keys, [one.ref for one in attempts])
    assert states == [State.SUCCEEDED] * 150 + [State.RUNNING] * 50


async def test_repeated_finish_is_told_done_and_changes_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await finish(redis, keys, one, value=b"the first value")
    before = await read_everything(redis)

    refused, _ = await finish(redis, keys, one, value=b"a second value")

    assert refused == {0: Finished.DONE}
    assert await read_everything(redis) == before


@pytest.mark.parametrize("count", [0, 2, 0.5, "many"])
async def test_group_that_is_not_as_long_as_it_says_is_refused_and_nothing_written(
    redis: Control, keys: DeploymentKeys, count: object
) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    good = scripts.finish(keys, "normal", 7, [one.entry, one.ref, CALLER, "succeeded", b"value"])
    arguments = [*good.arguments]
    arguments[4] = count
    before = await read_everything(redis)

    with pytest.raises(ResponseError, match="BADREQUEST a group is"):
        await run(redis, Call(good.script, good.keys, arguments, good.read))

    assert await read_everything(redis) == before


async def test_late_finisher_is_told_stale_while_the_next_attempt_waits(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (late,) = await seed_running(redis, keys)
    await release(redis, keys, late)

    refused, _ = await finish(redis, keys, late)

    assert refused == {0: Finished.STALE}
    assert await read_state(redis, keys, late.ref) == State.QUEUED


async def test_late_finisher_is_told_stale_while_the_next_attempt_runs(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (late,) = await seed_running(redis, keys)
    await release(redis, keys, late)
    await claim(redis, keys, replica="r-2")

    refused, _ = await finish(redis, keys, late)

    assert refused == {0: Finished.STALE}
    assert await read_state(redis, keys, late.ref) == State.RUNNING


async def test_value_of_a_late_finisher_does_not_replace_the_one_stored(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (late,) = await seed_running(redis, keys)
    await release(redis, keys, late)
    (second,) = await claim(redis, keys, replica="r-2")
    await finish(redis, keys, second, value=b"of the second")

    refused, _ = await finish(redis, keys, late, value=b"of the late one")

    assert refused == {0: Finished.STALE}
    assert await read_result(redis, keys, late.ref) == (
        f"succeeded returned {second.entry.decode()}",
        b"of the second",
    )


async def test_late_finisher_of_a_buried_request_is_told_stale(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys, max_attempts=1)
    (late,) = await seed_running(redis, keys)
    await release(redis, keys, late)

    refused, _ = await finish(redis, keys, late)

    assert refused == {0: Finished.STALE}
    assert await read_state(redis, keys, late.ref) == State.DEAD


async def test_entry_whose_id_begins_like_that_of_the_stored_result_is_stale(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    late = Claimed(new_ref(), "normal", b"5-1", {})
    await redis.set(keys.result(late.ref), b"succeeded normal 5-10\nvalue", ex=60)

    refused, _ = await finish(redis, keys, late)

    assert refused == {0: Finished.STALE}


async def test_finish_of_something_unknown_is_told_that_it_has_ended(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)

    refused, _ = await finish(redis, keys, Claimed(new_ref(), "normal", b"1-1", {}))

    assert refused == {0: Finished.ENDED}


async def test_batch_is_refused_by_position_and_the_rest_of_it_counts(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (late,) = await seed_running(redis, keys)
    await release(redis, keys, late)
    (second,) = await claim(redis, keys)
    await finish(redis, keys, second)
    done, fresh, other = await seed_running(redis, keys, 3)
    await finish(redis, keys, done)

    refused, _ = await finish(redis, keys, fresh, late, done, other)

    assert refused == {1: Finished.STALE, 2: Finished.DONE}
    assert await read_states(redis, keys, [fresh.ref, other.ref]) == [State.SUCCEEDED] * 2


async def test_caller_gets_one_message_per_flush(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    first, second, third = await seed_running(redis, keys, 3)
    async with open_inbox(redis, keys) as inbox:
        await finish(redis, keys, first, second, value=b"\x01p\r\n\x00value")
        await finish(redis, keys, third, state="failed")

        assert await inbox.take() == {
            first.ref: b"succeeded normal " + first.entry + b"\n\x01p\r\n\x00value",
            second.ref: b"succeeded normal " + second.entry + b"\n\x01p\r\n\x00value",
        }
        assert await inbox.take() == {third.ref: b"failed normal " + third.entry + b"\na value"}


async def test_each_caller_hears_of_its_own_requests_only(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    attempts = await seed_running(redis, keys, 3)
    async with open_inbox(redis, keys, "anna") as anna, open_inbox(redis, keys, "bert") as bert:
        outcomes = [
            part
            for one, caller in zip(attempts, ("anna", "bert", "anna"), strict=True)
            for part in (one.entry, one.ref, caller, "succeeded", b"value")
        ]
        await run(redis, scripts.finish(keys, "normal", 60, outcomes))

        assert (await anna.take()).keys() == {attempts[0].ref, attempts[2].ref}
        assert (await bert.take()).keys() == {attempts[1].ref}
        assert await anna.is_empty()
        assert await bert.is_empty()


async def test_refused_finish_tells_nobody(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await finish(redis, keys, one)
    async with open_inbox(redis, keys) as inbox:
        await finish(redis, keys, one)

        assert await inbox.is_empty()


@pytest.mark.parametrize(("stored_bytes", "is_inline"), [(4096, True), (4097, False), (100_000, False)])
async def test_large_result_is_announced_by_its_header_only(
    redis: Control, keys: DeploymentKeys, stored_bytes: int, is_inline: bool
) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    header = b"succeeded normal " + one.entry + b"\n"
    value = b"\n" * (stored_bytes - len(header))
    async with open_inbox(redis, keys) as inbox:
        await finish(redis, keys, one, value=value)

        assert await inbox.take() == {one.ref: header + value if is_inline else header}
    assert await redis.get(keys.result(one.ref)) == header + value


async def test_readers_are_told_too_and_each_once(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    watched, other = await seed_running(redis, keys, 2)
    for reader in ("anna", "bert", "anna"):
        await run(redis, scripts.watch(keys, "readers", reader, [watched.ref]))
    async with (
        open_inbox(redis, keys) as caller,
        open_inbox(redis, keys, "anna") as anna,
        open_inbox(redis, keys, "bert") as bert,
    ):
        await finish(redis, keys, watched, other)

        told = {watched.ref: b"succeeded normal " + watched.entry + b"\na value"}
        assert (await caller.take()).keys() == {watched.ref, other.ref}
        assert await anna.take() == await bert.take() == told
        assert await anna.is_empty()


async def test_reader_is_told_where_nobody_else_wants_the_reply(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys, caller="")
    await run(redis, scripts.watch(keys, "readers", "anna", [one.ref]))
    async with open_inbox(redis, keys, "anna") as anna:
        await finish(redis, keys, one, caller="")

        assert (await anna.take()).keys() == {one.ref}


async def test_waiters_are_reported_to_the_finisher(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    first, second = await seed_running(redis, keys, 2)
    await run(redis, scripts.watch(keys, "waiters", "app.B~b", [first.ref, second.ref]))
    await run(redis, scripts.watch(keys, "waiters", "app.C~c", [second.ref]))

    _, waiters = await finish(redis, keys, first, second)

    assert waiters == [
        Waiter(first.ref.encode(), "app.B~b"),
        Waiter(second.ref.encode(), "app.B~b"),
        Waiter(second.ref.encode(), "app.C~c"),
    ]
    assert not await redis.exists(keys.notes)


async def test_notes_outlive_a_takeover(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await run(redis, scripts.watch(keys, "readers", "anna", [one.ref]))
    await run(redis, scripts.watch(keys, "waiters", "app.B~b", [one.ref]))
    await release(redis, keys, one)
    (second,) = await claim(redis, keys, replica="r-2")
    async with open_inbox(redis, keys, "anna") as anna:
        _, waiters = await finish(redis, keys, second)

        assert (await anna.take()).keys() == {one.ref}
    assert waiters == [Waiter(one.ref.encode(), "app.B~b")]


async def test_history_of_a_second_attempt_is_still_in_its_entry(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (one,) = await seed_running(redis, keys)
    await release(redis, keys, one)

    (second,) = await claim(redis, keys, replica="r-2")

    assert second.fields[b"reply"] == CALLER.encode()
    assert [cause["replica"] for cause in json.loads(second.fields[b"history"])] == ["r-1"]
