"""Cancelling: wherever a request is, it ends there, and whoever waits for it is told."""

import asyncio
import random
import time
from typing import Any

import anyio
import anyio.to_thread
import pytest

import millstream
from millstream.broker import outcomes
from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys
from millstream.broker.states import State
from millstream.config import Settings
from millstream.errors import RefNotFoundError, RequestCancelledError
from millstream.handles import endings, engines
from millstream.handles.endings import Endings
from millstream.handles.ref import ObjectRef
from millstream.handles.route import Route
from tests.handles.elsewhere import run_elsewhere
from tests.handles.held import Model, Notes, in_state
from tests.helpers import read_state, read_states, wait_until
from tests.replica_helpers import Serving
from tests.timing import timed

pytestmark = pytest.mark.anyio


UNKNOWN = "app.Model~" + "u" * 22


# where a request is


@pytest.mark.parametrize("state", [State.PARKED, State.DELAYED, State.QUEUED, State.RUNNING])
async def test_request_ends_where_it_is_and_its_caller_is_told(
    serving: Serving, redis: Control, keys: DeploymentKeys, state: State, notes: Notes
) -> None:
    ref = await in_state(serving(Model, notes, max_ongoing_requests=1), state, notes)
    assert await ref.astatus() is state

    was_cancelled = await ref.acancel()

    assert was_cancelled is True
    with pytest.raises(RequestCancelledError, match="its caller cancelled it") as caught:
        await asyncio.wait_for(ref, 1)
    assert caught.value.ref_id == ref.id
    assert await read_state(redis, keys, ref.id[-22:]) is State.CANCELLED


async def test_ends_that_are_told_together_are_looked_up_together(
    serving: Serving, redis: Control, notes: Notes
) -> None:
    """What a message says of an end without a signature is read from the record: one script for many."""
    handle = serving(Model, notes, max_ongoing_requests=1)
    refs = [await handle.options(block_until="queued").remote(x) for x in range(300)]
    before = await calls_of(redis, "mget")

    engines.current().endings.cancel_soon([ref.id for ref in refs])
    ends = await asyncio.gather(*refs, return_exceptions=True)

    assert {type(end) for end in ends} == {RequestCancelledError}
    assert await calls_of(redis, "mget") - before <= 10


async def calls_of(redis: Control, command: str) -> int:
    return int((await redis.info("commandstats")).get(f"cmdstat_{command}", {}).get("calls", 0))


@pytest.mark.parametrize("state", [State.PARKED, State.DELAYED, State.QUEUED])
async def test_what_has_not_started_never_starts(
    serving: Serving, redis: Control, keys: DeploymentKeys, state: State, notes: Notes
) -> None:
    handle = serving(Model, notes, max_ongoing_requests=1)
    ref = await in_state(handle, state, notes)

    await ref.acancel()
    notes.gate.open()

    assert await handle.echo.call("after") == "after"
    assert set(notes.started) <= {"first"}
    assert await redis.zcard(keys.parked) == await redis.zcard(keys.due) == 0


async def test_running_coroutine_is_cancelled_inside(serving: Serving, notes: Notes) -> None:
    ref = await serving(Model, notes).remote(1)

    await ref.acancel()

    await wait_until(lambda: notes.cancelled == notes.ended == [1])


async def test_running_thread_is_told_and_its_value_is_ignored(serving: Serving, notes: Notes) -> None:
    handle = serving(Model, notes)
    ref = await handle.told.remote(1)

    await ref.acancel()

    await wait_until(lambda: notes.cancelled == [(1, True)])
    with pytest.raises(RequestCancelledError):
        await ref
    assert await handle.options(method_name="echo").call(2) == 2


async def test_thread_that_does_not_look_keeps_its_slot_until_it_ends(serving: Serving, notes: Notes) -> None:
    handle = serving(Model, notes, max_ongoing_requests=1)
    ref = await handle.deaf.remote(1)

    await ref.acancel()
    after = handle.echo.call("after")
    with anyio.move_on_after(0.2):
        await asyncio.shield(after)
    assert not after.done()
    notes.gate.open()

    assert await asyncio.wait_for(after, 5) == "after"
    with pytest.raises(RequestCancelledError):
        await ref


async def test_request_that_waits_for_a_thread_never_starts(serving: Serving, notes: Notes) -> None:
    handle = serving(Model, notes, max_ongoing_requests=5, sync_threads=1)
    await handle.deaf.remote("first")
    waiting = await handle.deaf.remote("waits for the thread")
    assert await waiting.astatus() is State.RUNNING

    assert await waiting.acancel()
    await wait_until(lambda: len(serving._hosted[0].replica._intake._executor.running) == 1)  # type: ignore[union-attr]
    notes.gate.open()

    assert await handle.whoami.call()  # behind it, in the same thread
    assert notes.started == ["first"]


async def test_coroutine_that_takes_no_notice_keeps_its_slot_and_its_value_is_ignored(
    serving: Serving, redis: Control, keys: DeploymentKeys, notes: Notes
) -> None:
    handle = serving(Model, notes, max_ongoing_requests=1)
    ref = await handle.stubborn.remote(1)

    await ref.acancel()
    await wait_until(lambda: notes.cancelled == [1])
    after = handle.echo.call("after")
    with anyio.move_on_after(0.2):
        await asyncio.shield(after)
    assert not after.done()
    notes.gate.open()

    assert await asyncio.wait_for(after, 5) == "after"
    assert notes.ended == [1]
    assert await read_state(redis, keys, ref.id[-22:]) is State.CANCELLED


async def test_no_more_run_at_once_than_allowed_while_the_cancelled_clean_up(serving: Serving) -> None:
    class Slow:
        def __init__(self) -> None:
            self.running = self.most = 0

        async def __call__(self) -> None:
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.shield(asyncio.sleep(0.02))
                self.running -= 1

        async def seen(self) -> int:
            return self.most

    handle = serving(Slow, max_ongoing_requests=3)
    refs = [await handle.options(block_until="queued").remote() for _ in range(12)]

    while await asyncio.gather(*[ref.astatus() for ref in refs]) != [State.CANCELLED] * 12:
        for ref in refs:
            if await ref.astatus() is State.RUNNING:
                await ref.acancel()

    assert await handle.seen.call() == 3


# who is told


@pytest.mark.parametrize("state", [State.PARKED, State.QUEUED, State.RUNNING])
async def test_reader_that_has_the_id_only_is_told(serving: Serving, state: State, notes: Notes) -> None:
    ref = await in_state(serving(Model, notes, max_ongoing_requests=1), state, notes)
    reading = asyncio.create_task(anyio.to_thread.run_sync(ObjectRef.from_id(ref.id).result, 10))
    await wait_until(lambda: bool(engines.background().engine.pending))

    await ref.acancel()

    with pytest.raises(RequestCancelledError):
        await asyncio.wait_for(reading, 1)


@pytest.mark.parametrize("state", [State.PARKED, State.DELAYED, State.QUEUED, State.RUNNING])
@timed
async def test_dependants_fail_at_once_with_the_original_error(serving: Serving, state: State, notes: Notes) -> None:
    handle = serving(Model, notes, max_ongoing_requests=1)
    ref = await in_state(handle, state, notes)
    chain: Any = ref
    for _ in range(3):
        chain = handle.take.remote(chain)
    last = await chain
    started = time.monotonic()

    await ref.acancel()

    with pytest.raises(RequestCancelledError) as caught:
        await asyncio.wait_for(last, 5)
    assert caught.value.ref_id == ref.id
    assert time.monotonic() - started < 1, "sweepers would take three seconds"


async def test_dependants_of_what_a_client_cancelled_that_died_at_once_are_found_by_a_sweeper(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = serving(Model)
    upstream = await handle.remote(1)
    last = await handle.take.remote(upstream)
    monkeypatch.setattr(endings.Endings, "_supply", lambda *_: asyncio.sleep(0))  # as if it had been killed before that

    await upstream.acancel()

    with pytest.raises(RequestCancelledError):
        await asyncio.wait_for(last, 10)


# who may cancel, and how


@pytest.mark.parametrize("cancel", [ObjectRef.cancel, millstream.cancel])
async def test_sync_code_cancels_from_any_thread(serving: Serving, cancel: Any) -> None:
    ref = await serving(Model).remote(1)

    assert await anyio.to_thread.run_sync(cancel, ref) is True

    with pytest.raises(RequestCancelledError):
        await ref


async def test_request_that_arrives_just_behind_its_cancel_is_cancelled(
    serving: Serving, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another connection may carry the cancel; both answers may then come at the same time."""
    handle = serving(Model, notes, max_ongoing_requests=1)
    holding = await handle.remote(1)
    original, asked = Endings._run_cancel, list[bytes]()

    async def run_cancel(self: Endings, route: Route, refs: list[bytes]) -> Any:
        asked.extend(refs)
        if len(asked) > 1:
            return await original(self, route, refs)
        await wait_until(lambda: not engines.current().on_their_way(route, refs))
        return [], refs  # the cancel was there first

    monkeypatch.setattr(Endings, "_run_cancel", run_cancel)
    monkeypatch.setattr(Endings, "_was_never_sent", lambda self, ref: False)
    ref = handle.remote(2).ref

    assert await ref.acancel() is True

    with pytest.raises(RequestCancelledError):
        await asyncio.wait_for(ref, 5)
    notes.gate.open()
    await holding
    assert notes.started == [1]


async def test_sync_code_on_the_loop_itself_cancels_what_that_loop_has_not_even_sent(
    serving: Serving, notes: Notes
) -> None:
    handle = serving(Model, notes, max_ongoing_requests=1)
    await handle.echo.call("connected")
    task = handle.remote(1)
    await wait_until(lambda: notes.started == [1])
    unsent = [handle.remote(x) for x in range(2, 200)]

    with pytest.warns(RuntimeWarning, match="acancel"):
        assert unsent[-1].ref.cancel() is True

    with pytest.raises(RequestCancelledError):
        await asyncio.wait_for(unsent[-1].ref, 1)
    notes.gate.open()
    await (await task)
    await asyncio.gather(*[one.ref for one in unsent[:-1]])
    assert 199 not in notes.started


async def test_another_process_cancels_by_id(serving: Serving, settings: Settings, notes: Notes) -> None:
    ref = await serving(Model, notes).remote(1)
    code = f"import millstream; print(millstream.cancel(millstream.ObjectRef.from_id({ref.id!r})))"

    ran = await run_elsewhere(settings, code)

    assert ran.stdout == "True\n"
    with pytest.raises(RequestCancelledError):
        await asyncio.wait_for(ref, 1)
    await wait_until(lambda: notes.cancelled == [1])


def test_only_refs_can_be_cancelled() -> None:
    with pytest.raises(TypeError, match="takes a ref, not str"):
        millstream.cancel("app.Model~" + "u" * 22)  # type: ignore[arg-type]


# nothing to cancel


async def test_unknown_request_cannot_be_cancelled_and_stays_unknown(serving: Serving, redis: Control) -> None:
    serving.deploy_only(Model)
    ref = ObjectRef.from_id(UNKNOWN)
    keys_before = await redis.dbsize()

    assert await ref.acancel() is False

    assert await redis.dbsize() == keys_before
    with pytest.raises(RefNotFoundError):
        await ref


async def test_unknown_request_that_somebody_waits_for_cannot_be_cancelled_either(serving: Serving) -> None:
    serving.deploy_only(Model)
    waiting = asyncio.ensure_future(value_of(UNKNOWN))

    assert await ObjectRef.from_id(UNKNOWN).acancel() is False

    with pytest.raises(RefNotFoundError):
        await waiting


async def value_of(ref_id: str) -> Any:
    return await ObjectRef.from_id(ref_id)


async def test_ended_request_keeps_its_value(serving: Serving) -> None:
    ref = await serving(Model).echo.remote(1)
    assert await ref == 1

    assert await ref.acancel() is False

    assert await ObjectRef.from_id(ref.id) == 1


async def test_value_that_was_put_cannot_be_cancelled(connected: Settings) -> None:
    ref = await anyio.to_thread.run_sync(millstream.put, 1)

    assert await ref.acancel() is False
    assert await ref == 1


async def test_second_cancel_finds_nothing(serving: Serving) -> None:
    ref = await serving(Model).remote(1)

    assert await ref.acancel() is True
    assert await ref.acancel() is False


async def test_of_many_who_cancel_at_once_one_does_it(serving: Serving) -> None:
    ref = await serving(Model).remote(1)

    answers = await asyncio.gather(
        *[ref.acancel() for _ in range(10)], *[anyio.to_thread.run_sync(ref.cancel) for _ in range(10)]
    )

    assert sorted(answers) == [False] * 19 + [True]


@pytest.mark.parametrize("method", ["slowly", "in_thread"])
async def test_request_is_either_cancelled_or_ends_never_both(
    serving: Serving, redis: Control, keys: DeploymentKeys, method: str
) -> None:
    class Quick:
        async def slowly(self, in_s: float) -> str:
            await asyncio.sleep(in_s)
            return "value"

        def in_thread(self, in_s: float) -> str:
            time.sleep(in_s)
            return "value"

    rng, outcomes_seen = random.Random(4), set[bool]()
    handle = serving(Quick, name="Model", sync_threads=8).options(method_name=method)
    await handle.call(0)

    async def one() -> None:
        in_s = rng.choice([0, 0.001, 0.002, 0.004])
        ref = handle.options(block_until="queued").remote(in_s).ref
        await asyncio.sleep(rng.uniform(0, 2 * in_s + 0.001))
        was_cancelled = await ref.acancel()
        try:
            value = await asyncio.wait_for(ref, 5)
        except RequestCancelledError:
            value = None
        state = await read_state(redis, keys, ref.id[-22:])
        assert (value, state) == ((None, State.CANCELLED) if was_cancelled else ("value", State.SUCCEEDED))
        outcomes_seen.add(was_cancelled)

    for _ in range(30):
        await asyncio.gather(*[one() for _ in range(10)])

    assert outcomes_seen == {True, False}


# keys


async def test_nothing_of_a_cancelled_request_is_left_but_its_result(
    serving: Serving, redis: Control, keys: DeploymentKeys, notes: Notes
) -> None:
    handle = serving(Model, notes, max_ongoing_requests=1)
    upstream = await handle.remote("first")
    large = b"x" * 1_000_000
    refs = [
        await handle.options(timeout_s=60, block_until="queued").remote(large),
        await handle.options(timeout_s=60).take.remote(upstream, large),
        await handle.options(timeout_s=60, delay_s=30).remote(large),
    ]

    for ref in refs:
        assert await ref.acancel()

    assert await redis.keys(f"{keys.payload_prefix}*") == []
    assert await redis.exists(keys.parked, keys.due, keys.deadlines, keys.holds) == 0
    assert await read_states(redis, keys, [ref.id[-22:] for ref in refs]) == [State.CANCELLED] * 3
    for ref in refs:
        assert 0 < await redis.ttl(keys.result(ref.id[-22:])) <= outcomes.ENDED_TTL_S
