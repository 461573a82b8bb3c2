"""Each row of the table of transitions, carried out by the scripts; and each pair that is not in it, refused."""

from dataclasses import dataclass
from typing import Any

import pytest

from millstream.broker import control_scripts, scripts
from millstream.broker.connection import Control, run
from millstream.broker.keys import DeploymentKeys
from millstream.broker.scripts import Ended, Finished, Forestalled, Requeued, Submitted, Supplied
from millstream.broker.states import TERMINAL, TRANSITIONS, Event, State
from tests.helpers import (
    BODY,
    CALLER,
    REPLICA,
    age,
    cancel,
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

UPSTREAM = "up.Up~" + "u" * 22
LATER_MS = 4_000_000_000_000
STATES: tuple[State | None, ...] = (None, *State)
# A queued request was handed back: so there is a former owner whose entry is no longer the one that counts.
WAYS_FROM_RUNNING = {
    State.QUEUED: Event.HAND_BACK,
    State.SUCCEEDED: Event.SUCCEED,
    State.FAILED: Event.FAIL,
    State.DEAD: Event.BURY,
    State.CANCELLED: Event.CANCEL,
    State.TIMED_OUT: Event.EXPIRE,
}
REFUSED = [(state, event) for state in STATES for event in Event if (state, event) not in TRANSITIONS]


@dataclass(frozen=True, slots=True)
class Subject:
    """A request in some state, and the attempt that somebody owns, owned, or believes to own."""

    ref: str
    lane: str = "normal"
    entry: bytes = b"1-1"


@pytest.mark.parametrize(("state", "event", "target"), [(*pair, target) for pair, target in TRANSITIONS.items()])
async def test_transition_in_the_table_is_carried_out(
    redis: Control, keys: DeploymentKeys, state: State | None, event: Event, target: State
) -> None:
    await deploy_config(redis, keys)
    subject = await seed(redis, keys, state)
    assert await read_state(redis, keys, subject.ref) == state

    await carry_out(redis, keys, event, subject)

    assert await read_state(redis, keys, subject.ref) == target


@pytest.mark.parametrize(("state", "event"), REFUSED)
async def test_transition_not_in_the_table_is_refused_and_changes_nothing(
    redis: Control, keys: DeploymentKeys, state: State | None, event: Event
) -> None:
    await deploy_config(redis, keys)
    subject = await seed(redis, keys, state)
    await prepare(redis, keys, event, subject)
    before = await read_everything(redis)

    answer = await carry_out(redis, keys, event, subject)

    assert answer == refusal(state, event)
    assert await read_everything(redis) == before


def test_every_state_can_be_reached_and_the_only_way_out_of_a_terminal_one_is_an_operators() -> None:
    assert set(TRANSITIONS.values()) == set(State)
    assert {(state, event) for state, event in TRANSITIONS if state in TERMINAL} == {(State.DEAD, Event.REQUEUE)}
    assert {state for state, _ in TRANSITIONS} == {None, State.DEAD, *State} - (TERMINAL - {State.DEAD})


async def seed(redis: Control, keys: DeploymentKeys, state: State | None) -> Subject:
    match state:
        case None:
            return Subject(new_ref())
        case State.PARKED:
            return Subject(await seed_parked(redis, keys, UPSTREAM))
        case State.DELAYED:
            return Subject(await seed_delayed(redis, keys))
        case _:
            (one,) = await seed_running(redis, keys)
            subject = Subject(one.ref, one.lane, one.entry)
    if state != State.RUNNING:
        await carry_out(redis, keys, WAYS_FROM_RUNNING[state], subject)
    return subject


async def prepare(redis: Control, keys: DeploymentKeys, event: Event, subject: Subject) -> None:
    """What the event needs besides the request: a time that has come or not, attempts that are used up."""
    match event:
        case Event.PROMOTE:
            await age(redis, keys.due, subject.ref)
        case Event.SUPPLY_EARLY if await redis.hexists(keys.held, subject.ref):
            await set_due(redis, keys, subject.ref, LATER_MS)
        case Event.EXPIRE if await redis.hexists(keys.open, subject.ref):
            await redis.zadd(keys.deadlines, {subject.ref: 1})
        case Event.BURY:
            await redis.hset(keys.config, "max_attempts", 1)


async def carry_out(redis: Control, keys: DeploymentKeys, event: Event, subject: Subject) -> Any:
    """Attempt the event as whoever believes it is time for it would; the script's answer."""
    await prepare(redis, keys, event, subject)
    ref, lane, entry = subject.ref, subject.lane, subject.entry
    match event:
        case Event.SUBMIT:
            return (await run(redis, scripts.submit(keys, CALLER, request(ref)))).get(0, Submitted.NEW)
        case Event.PARK:
            call = scripts.hold(keys, CALLER, ref.encode(), "normal", b"m", BODY, depends_on=[UPSTREAM])
            return await run(redis, call)
        case Event.DELAY:
            call = scripts.hold(keys, CALLER, ref.encode(), "normal", b"m", BODY, delay_ms=3_600_000)
            return await run(redis, call)
        case Event.SUPPLY | Event.SUPPLY_EARLY:
            return await run(redis, scripts.supply(keys, ref, UPSTREAM, b"succeeded normal 1-1\nvalue"))
        case Event.REJECT:
            before = await redis.exists(keys.result(ref))
            waiters = await run(redis, scripts.reject(keys, ref, 60, b"error"))
            return waiters, await redis.exists(keys.result(ref)) - before
        case Event.PROMOTE:
            return (await run(redis, control_scripts.sweep(keys))).promoted
        case Event.CLAIM:
            return await claim(redis, keys, 5)
        case Event.HAND_BACK:
            return await run(redis, scripts.hand_back(keys, lane, lane, [entry]))
        case Event.RELEASE | Event.BURY:
            released = await run(redis, scripts.release(keys, lane, REPLICA, "killed", expired=False))
            return released.requeued, released.buried
        case Event.CANCEL | Event.EXPIRE:
            return await cancel(redis, keys, ref, overdue=event == Event.EXPIRE)
        case Event.DISCARD:
            before = await redis.hlen(keys.open)
            await run(redis, scripts.discard(keys, "0", 60, "deleted", running=True))
            return before - await redis.hlen(keys.open)
        case Event.RETRY | Event.POSTPONE:
            how = '{"replica": "r-1", "cause": "raised ValueError"}' if event == Event.RETRY else ""
            failure = (entry, ref, 1000, how)
            return await run(redis, scripts.retry(keys, lane, failure))
        case Event.REQUEUE:
            letters: Any = await redis.xrange(keys.dead)
            entries = [entry.decode() for entry, fields in letters if fields[b"ref"].decode() == ref]
            return await run(redis, scripts.requeue(keys, entries or ["1-1"]))
        case Event.FORESTALL:
            return await run(redis, scripts.forestall(keys, ref, 60, "its caller cancelled it"))
        case Event.SUCCEED | Event.FAIL:
            outcome = (entry, ref.encode(), CALLER, "succeeded" if event == Event.SUCCEED else "failed", b"body")
            refused, _ = await run(redis, scripts.finish(keys, lane, 60, outcome))
            return refused.get(0)


def refusal(state: State | None, event: Event) -> Any:
    """What a script answers to an event that is not in the table."""
    match event:
        case Event.SUBMIT | Event.PARK | Event.DELAY:
            return Submitted.DONE if state in TERMINAL else Submitted.OPEN
        case Event.SUPPLY | Event.SUPPLY_EARLY:
            return Supplied.GONE
        case Event.REJECT:
            return [], 0
        case Event.PROMOTE | Event.HAND_BACK | Event.DISCARD:
            return 0
        case Event.CLAIM:
            return []
        case Event.CANCEL | Event.EXPIRE:
            return [Ended.GONE]
        case Event.RETRY | Event.POSTPONE:
            return [0]
        case Event.REQUEUE:
            return [Requeued.GONE]
        case Event.FORESTALL:
            return Forestalled.ENDED if state in TERMINAL else Forestalled.OPEN
        case Event.RELEASE | Event.BURY:
            return 0, 0
        case Event.SUCCEED | Event.FAIL if state in (State.SUCCEEDED, State.FAILED):
            return Finished.DONE
        case Event.SUCCEED | Event.FAIL:
            return Finished.ENDED if state in (None, State.CANCELLED, State.TIMED_OUT) else Finished.STALE
