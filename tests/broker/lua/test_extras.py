"""extras.lua, in submit.lua and hold.lua: what a caller asks beyond the usual; and what makes no sense writes nothing."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from redis.exceptions import ResponseError

from millstream.broker import scripts
from millstream.broker.call import Call
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.scripts import Submitted, Supplied
from millstream.broker.states import State
from tests.helpers import (
    BODY,
    CALLER,
    REPLICA,
    asking,
    claim,
    deploy_config,
    new_ref,
    read_everything,
    read_state,
    request,
    seed_delayed,
    seed_parked,
    seed_running,
    set_due,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]

A = "up.A~" + "a" * 22
PLAIN = {b"ref", b"method", b"reply", b"body"}
EVERYTHING = asking(want="matched", timeout_ms=3_600_000, attempts=1, kill=True, stream=16, payload=True)
GARBAGE = [
    "queued",
    "{",
    '{"want": "matched"',
    "5",
    "null",
    "true",
    '"matched"',
    asking(want={}),
    asking(want=["matched"]),
    asking(stream={"ahead": 3}),
    asking(payload=[1]),
    asking(timeout_ms="soon"),
    '{"timeout_ms": NaN}',
    '{"timeout_ms": -NaN}',
    '{"timeout_ms": 1e999}',
    asking(attempts=0),
    asking(attempts=-1),
    asking(attempts="many"),
]


def submit_last(keys: DeploymentKeys, extras: str) -> Call[Any]:
    """A batch whose last request is the one in question: the others must not be written either."""
    refs = [new_ref() for _ in range(3)]
    return scripts.submit(
        keys, CALLER, request(refs[0], lane="high") + request(refs[1]) + request(refs[2], extras=extras)
    )


def hold(keys: DeploymentKeys, extras: str) -> Call[Any]:
    return scripts.hold(keys, CALLER, new_ref().encode(), "low", b"m", BODY, extras=extras.encode(), depends_on=[A])


Make = Callable[[DeploymentKeys, str], Call[Any]]
BOTH = pytest.mark.parametrize("make", [submit_last, hold])


# what is asked


@pytest.mark.parametrize(
    ("extras", "field", "value"),
    [
        ("matched", b"want", b"matched"),
        (asking(want="matched"), b"want", b"matched"),
        (asking(attempts=5), b"max_attempts", b"5"),
        (asking(kill=True), b"kill", b"1"),
        (asking(kill=1), b"kill", b"1"),
        (asking(stream=16), b"stream", b"16"),
        (asking(stream=True), b"stream", b"1"),
    ],
)
async def test_what_is_asked_is_a_field_of_the_request(
    redis: Control, keys: DeploymentKeys, extras: str, field: bytes, value: bytes
) -> None:
    await deploy_config(redis, keys)

    (one,) = await seed_running(redis, keys, extras=extras)

    assert one.fields.keys() - PLAIN == {field}
    assert one.fields[field] == value


@pytest.mark.parametrize(
    "extras", ["", "{}", "[]", asking(want=None, timeout_ms=None, attempts=None, kill=False), asking(colour="blue")]
)
async def test_nothing_asked_is_no_field(redis: Control, keys: DeploymentKeys, extras: str) -> None:
    await deploy_config(redis, keys)

    (one,) = await seed_running(redis, keys, extras=extras)

    assert one.fields.keys() == PLAIN
    assert not await redis.exists(keys.notes, keys.deadlines)


async def test_each_request_of_a_batch_has_its_own(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    wishes = ["", "matched", asking(kill=True), "", asking(attempts=2)]

    batch = [part for extras in wishes for part in request(new_ref(), extras=extras)]
    await run(redis, scripts.submit(keys, CALLER, batch))

    assert [one.fields.keys() - PLAIN for one in await claim(redis, keys, 5)] == [
        set(),
        {b"want"},
        {b"kill"},
        set(),
        {b"max_attempts"},
    ]


@pytest.mark.parametrize("how", ["parked", "delayed"])
async def test_what_is_asked_of_a_held_request_goes_into_its_lane_with_it(
    redis: Control, keys: DeploymentKeys, how: str
) -> None:
    await deploy_config(redis, keys)
    extras = asking(want="matched", attempts=5, kill=True, stream=16)
    if how == "parked":
        ref = await seed_parked(redis, keys, A, extras=extras)
        await run(redis, scripts.supply(keys, ref, A, b"value"))
    else:
        ref = await seed_delayed(redis, keys, extras=extras)
        await redis.zadd(keys.due, {ref: 1})
        await run(redis, scripts.wake(keys))

    (one,) = await claim(redis, keys)

    asked = {name: value for name, value in one.fields.items() if name not in PLAIN and name[:4] != b"dep:"}
    assert asked == {b"want": b"matched", b"max_attempts": b"5", b"kill": b"1", b"stream": b"16"}


async def test_what_is_asked_outlives_a_hand_back_and_a_takeover(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    (first,) = await seed_running(redis, keys, extras=asking(want="matched", attempts=5, kill=True, stream=16))
    await run(redis, scripts.hand_back(keys, "normal", "normal", [first.entry]))
    (second,) = await claim(redis, keys)

    await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))

    (third,) = await claim(redis, keys, replica="r-2")
    assert second.fields == first.fields
    assert first.fields.items() <= third.fields.items()


@pytest.mark.parametrize(("asked", "deployed", "state"), [(1, 3, State.DEAD), (3, 1, State.QUEUED)])
async def test_attempts_that_are_asked_go_before_those_of_the_deployment(
    redis: Control, keys: DeploymentKeys, asked: int, deployed: int, state: State
) -> None:
    await deploy_config(redis, keys, max_attempts=deployed)
    (one,) = await seed_running(redis, keys, extras=asking(attempts=asked))

    await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))

    assert await read_state(redis, keys, one.ref) == state


async def test_request_that_asks_for_everything_and_waits_for_the_most_refs_is_queued_and_released(
    redis: Control, keys: DeploymentKeys
) -> None:
    await deploy_config(redis, keys)
    ref, upstream = new_ref(), [f"up.Up~{number:022d}" for number in range(3900)]
    await redis.set(keys.payload(ref), b"arguments", px=600_000)
    call = scripts.hold(
        keys, CALLER, ref.encode(), "low", b"m", b"", extras=EVERYTHING.encode(), delay_ms=1, depends_on=upstream
    )
    await run(redis, call)
    await redis.hset(
        keys.supplied(ref), mapping={"missing": 1, **{f"dep:{value_id}": "v" for value_id in upstream[1:]}}
    )
    await set_due(redis, keys, ref, 1)

    supplied = await run(redis, scripts.supply(keys, ref, upstream[0], b"v"))
    await claim(redis, keys)
    released = await run(redis, scripts.release(keys, "low", REPLICA, "killed", expired=False))

    assert (supplied, released.buried) == (Supplied.QUEUED, 1)
    assert await read_state(redis, keys, ref) == State.DEAD


# what makes no sense


@BOTH
@pytest.mark.parametrize("extras", GARBAGE)
async def test_extras_that_make_no_sense_are_refused_and_write_nothing(
    redis: Control, keys: DeploymentKeys, make: Make, extras: str
) -> None:
    await deploy_config(redis, keys)
    before = await read_everything(redis)

    with pytest.raises(ResponseError, match="BADREQUEST extras"):
        await run(redis, make(keys, extras))

    assert await read_everything(redis) == before


async def test_lane_that_does_not_exist_is_refused_and_writes_nothing(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    before = await read_everything(redis)

    with pytest.raises(ResponseError, match="BADREQUEST there is no lane urgent"):
        await run(redis, scripts.submit(keys, CALLER, request(new_ref()) + request(new_ref(), lane="urgent")))
    with pytest.raises(ResponseError, match="BADREQUEST there is no lane open"):
        await run(redis, scripts.hold(keys, CALLER, new_ref().encode(), "open", b"m", BODY, delay_ms=1))

    assert await read_everything(redis) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("normal", b"m", ""),
        ("normal", b"m", "", 1, new_ref()),
        ("normal", b"m", "", 2, new_ref(), b"body"),
        ("normal", b"m", "", 0),
        ("normal", b"m", "", -1, new_ref(), b"body"),
        ("normal", b"m", "", 0.5, new_ref(), b"body"),
        ("normal", b"m", "", "nan", new_ref(), b"body"),
        ("normal", b"m", "", "many", new_ref(), b"body"),
        ("normal", b"m", "", 1, new_ref(), b"body", "more"),
    ],
)
@pytest.mark.parametrize("is_alone", [True, False])
async def test_group_that_is_not_as_long_as_it_says_is_refused_and_nothing_written(
    redis: Control, keys: DeploymentKeys, arguments: Sequence[Any], is_alone: bool
) -> None:
    await deploy_config(redis, keys)
    call = scripts.submit(keys, CALLER, request(new_ref()))
    before = await read_everything(redis)

    others = call.arguments[:1] if is_alone else call.arguments
    with pytest.raises(ResponseError, match="BADREQUEST a group is"):
        await run(redis, Call(call.script, call.keys, (*others, *arguments), call.read))

    assert await read_everything(redis) == before


@pytest.mark.parametrize(("delay_ms", "due_ms"), [("soon", 0), ("nan", 0), (0, "inf"), (0, ""), (1e300, 0)])
async def test_times_that_are_no_numbers_are_refused_and_write_nothing(
    redis: Control, keys: DeploymentKeys, delay_ms: Any, due_ms: Any
) -> None:
    await deploy_config(redis, keys)
    before = await read_everything(redis)
    call = scripts.hold(keys, CALLER, new_ref().encode(), "low", b"m", BODY, delay_ms=delay_ms, due_ms=due_ms)

    with pytest.raises(ResponseError, match="BADREQUEST times are numbers"):
        await run(redis, call)

    assert await read_everything(redis) == before


async def test_ref_that_a_foreign_caller_names_twice_is_waited_for_once(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()
    twice = scripts.hold(keys, CALLER, ref.encode(), "low", b"m", BODY, depends_on=[A, A])

    assert await run(redis, twice) == Submitted.NEW

    assert await run(redis, scripts.supply(keys, ref, A, b"value")) == Supplied.QUEUED


# an entry that somebody wrote by hand


@pytest.mark.parametrize("name", ["max_attempts", "attempt"])
async def test_number_that_makes_no_sense_in_an_entry_loses_no_request(
    redis: Control, keys: DeploymentKeys, name: str
) -> None:
    await deploy_config(redis, keys)
    ref = new_ref()
    entry: Any = await redis.xadd(keys.lane("normal"), {"ref": ref, "method": "m", "reply": "", "body": "", name: "x"})
    await redis.hset(keys.open, ref, f"normal {entry.decode()}")
    await run(redis, scripts.claim(keys, REPLICA, 1))

    released = await run(redis, scripts.release(keys, "normal", REPLICA, "killed", expired=False))

    assert released.requeued == 1
    assert await read_state(redis, keys, ref) == State.QUEUED
