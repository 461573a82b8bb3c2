"""Limits: how many may wait in a deployment's queue, and how much a process may hold that no server has taken."""

import asyncio
from collections import Counter
from typing import Any

import anyio
import anyio.to_thread
import pytest

from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys
from millstream.config import Settings
from millstream.errors import BackPressureError
from millstream.handles import engines, submitter
from millstream.handles.handle import DeploymentHandle
from millstream.handles.route import size_of
from tests.handles.elsewhere import run_elsewhere
from tests.handles.held import Model, Notes
from tests.handles.queues import LIMIT, full, patient, value_of, waiting
from tests.helpers import wait_until
from tests.replica_helpers import Serving
from tests.servers import Server

pytestmark = pytest.mark.anyio

# refused


@pytest.mark.parametrize("how", ["call", "remote", "queued", "sync call", "sync remote", "map", "large", "with a key"])
async def test_request_to_a_full_queue_is_refused(serving: Serving, notes: Notes, how: str) -> None:
    handle = await full(serving, notes)

    with pytest.raises(BackPressureError, match="max_queued_requests") as caught:
        await value_of(handle, how)

    assert caught.value.deployment == "app.Model"
    notes.gate.open()
    assert await patient(handle).echo.call("after") == "after"
    assert notes.started == ["first", *range(LIMIT)]


async def test_of_a_batch_that_is_too_large_the_first_ones_are_taken(serving: Serving, notes: Notes) -> None:
    handle = serving(Model, notes, max_ongoing_requests=1, max_queued_requests=LIMIT)
    await handle.remote("first")

    futures = [handle.call(x) for x in range(60)]
    await wait_until(lambda: sum(future.done() for future in futures) == 60 - LIMIT)
    notes.gate.open()
    answers = await asyncio.gather(*futures, return_exceptions=True)

    assert answers[:LIMIT] == list(range(LIMIT))
    assert all(isinstance(answer, BackPressureError) for answer in answers[LIMIT:])


async def test_request_that_was_refused_leaves_nothing(serving: Serving, redis: Control, notes: Notes) -> None:
    handle = await full(serving, notes)
    before = await redis.dbsize()

    with pytest.raises(BackPressureError):
        await handle.options(timeout_s=60).call("it")

    assert await redis.dbsize() == before
    assert engines.current().sender._unqueued == set()


@pytest.mark.parametrize("kind", ["delayed", "parked"])
async def test_what_does_not_queue_yet_is_never_refused(serving: Serving, notes: Notes, kind: str) -> None:
    handle = await full(serving, notes)
    upstream = await handle.options(delay_s=0.1).echo.remote("value")

    if kind == "delayed":
        futures = [handle.options(delay_s=0.05).call(x) for x in range(20)]
    else:
        futures = [handle.take.call(upstream) for _ in range(20)]
    await asyncio.sleep(0.2)
    notes.gate.open()

    assert len(await asyncio.wait_for(asyncio.gather(*futures), 5)) == 20


async def test_request_that_was_open_before_is_answered_though_the_queue_is_full(
    serving: Serving, notes: Notes
) -> None:
    handle = serving(Model, notes, max_ongoing_requests=1, max_queued_requests=1)
    await handle.remote("first")
    keyed = handle.options(idempotency_key="k", block_until="queued")
    ref = await keyed.remote("it")

    again = await keyed.remote("it")

    assert again == ref


# many clients


async def hammer(handle: DeploymentHandle, count: int) -> Counter[str]:
    """Send as fast as possible; how many were taken and how many refused."""
    futures = [handle.call(x) for x in range(count)]
    answers = await asyncio.gather(*futures, return_exceptions=True)
    return Counter("refused" if isinstance(answer, BackPressureError) else type(answer).__name__ for answer in answers)


HAMMER = """
    import asyncio, collections
    from millstream import BackPressureError, DeploymentHandle

    async def main():
        handle = DeploymentHandle("Counts", "app")
        futures = []
        for x in range(200):
            futures.append(handle.call(x))
            await asyncio.sleep(0)
        answers = await asyncio.gather(*futures, return_exceptions=True)
        print(collections.Counter("refused" if isinstance(a, BackPressureError) else type(a).__name__ for a in answers))

    asyncio.run(main())
    """


async def test_limit_holds_for_many_threads_and_processes_and_all_that_were_taken_run(
    serving: Serving, settings: Settings, redis: Control
) -> None:
    class Counts:
        def __init__(self) -> None:
            self.count = 0

        async def __call__(self, x: int) -> int:
            self.count += 1
            await asyncio.sleep(0.001)
            return x

    most, is_over = 0, False
    keys = DeploymentKeys("ms", "app.Counts")
    handle = serving(Counts, max_ongoing_requests=3, max_queued_requests=LIMIT, replicas=2)

    async def watch() -> None:
        nonlocal most
        while not is_over:
            most = max(most, await waiting(redis, keys))
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    counts: list[Any] = await asyncio.gather(
        *[anyio.to_thread.run_sync(asyncio.run, hammer(handle, 200)) for _ in range(3)],
        *[run_elsewhere(settings, HAMMER) for _ in range(2)],
    )
    is_over = True
    await watching

    total = sum(
        (count if isinstance(count, Counter) else eval(count.stdout, {"Counter": Counter}) for count in counts),
        Counter[str](),
    )
    assert set(total) == {"int", "refused"} and total.total() == 5 * 200
    assert 0 < most <= LIMIT
    ran = sum(served.count for served in (one.replica._intake._executor._served.instance for one in serving._hosted))  # type: ignore[union-attr]
    assert ran == total["int"]


# what a process holds


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitter, "MOST_BUFFERED_BYTES", 100_000)


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize("when_full", ["raise", "wait"])
async def test_process_does_not_hold_more_than_so_much_while_the_server_is_down(
    own_server: Server, serving_there: Serving, when_full: Any
) -> None:
    handle = serving_there(Model).options(when_full=when_full)
    await handle.echo.call("connected")
    own_server.kill()
    await wait_until(lambda: engines.current().lines.commands is None)

    futures = [handle.echo.call(x.to_bytes(1000)) for x in range(300)]
    refused = [future for future in futures if future.done()]
    own_server.start()

    assert 150 < len(refused) < 250
    assert futures[: 300 - len(refused)] == [future for future in futures if not future.done()]
    for future in refused:
        with pytest.raises(BackPressureError, match=r"100,000 bytes .* has not taken"):
            await future
    kept = futures[: 300 - len(refused)]
    assert await asyncio.wait_for(asyncio.gather(*kept), 10) == [x.to_bytes(1000) for x in range(len(kept))]
    assert await handle.echo.call("again") == "again"


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize("kind", ["large", "delayed"])
async def test_what_takes_several_steps_counts_too(own_server: Server, serving_there: Serving, kind: str) -> None:
    handle = serving_there(Model).options(delay_s=0.01 if kind == "delayed" else 0)
    await handle.echo.call("connected")
    own_server.kill()
    await wait_until(lambda: engines.current().lines.commands is None)

    futures = [handle.echo.call(b"x" * (90_000 if kind == "large" else 10_000)) for _ in range(20)]
    await asyncio.sleep(0)
    refused = sum(future.done() for future in futures)
    own_server.start()

    assert refused == (19 if kind == "large" else 11)
    answers = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 10)
    assert sum(isinstance(answer, BackPressureError) for answer in answers) == refused
    assert engines.current().chores._sending_bytes == 0


@pytest.mark.usefixtures("little_room")
async def test_single_request_may_be_larger_than_all_that_may_wait(serving: Serving) -> None:
    handle = serving(Model)

    assert len(await handle.echo.call(b"x" * 1_000_000)) == 1_000_000


@pytest.mark.parametrize(("limit", "most"), [("MOST_IN_THE_AIR", 2), ("MOST_BYTES_IN_THE_AIR", 50_000)])
async def test_no_more_than_so_much_is_in_the_air(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, limit: str, most: int
) -> None:
    monkeypatch.setattr(submitter, limit, most)
    handle = serving(Model)
    await handle.echo.call("connected")
    route = engines.current().route("app.Model")

    futures = [handle.echo.call(x) for x in range(1000)]

    assert route.in_the_air <= 10 and len(route.buffer) > 3000
    assert await asyncio.gather(*futures) == list(range(1000))
    assert (route.in_the_air, route.bytes_in_the_air, route.buffer, route.buffered_bytes) == (0, 0, [], 0)


async def test_dependant_of_what_waits_behind_many_finds_it(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitter, "MOST_IN_THE_AIR", 1)
    handle = serving(Model)
    await handle.echo.call("connected")

    futures = [handle.echo.call(x) for x in range(1000)]
    dependant = handle.take.call(handle.echo.remote("last"))

    assert await asyncio.wait_for(dependant, 5) == ("last",)
    await asyncio.gather(*futures)


async def test_size_of_the_buffer_is_known_at_all_times(own_server: Server, serving_there: Serving) -> None:
    handle = serving_there(Model)
    await handle.echo.call("connected")
    route = engines.current().route("app.Model")
    own_server.freeze()
    futures = [handle.echo.call(b"x" * (x % 500)) for x in range(300)]
    own_server.kill()
    await wait_until(lambda: engines.current().lines.commands is None)
    tasks = [handle.echo.remote(b"y" * x) for x in range(20)]

    assert route.buffered_bytes == size_of(route.buffer) > 0
    for task in tasks[::2]:
        await task.ref.acancel()
    assert route.buffered_bytes == size_of(route.buffer)
    own_server.start()

    assert len(await asyncio.wait_for(asyncio.gather(*futures), 10)) == 300
    await asyncio.gather(*tasks)
    await wait_until(lambda: route.buffered_bytes == 0)
