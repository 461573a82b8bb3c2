import logging
from collections.abc import Awaitable, Callable

import anyio
import pytest

from millstream.broker.control_scripts import Backlog
from millstream.config import Settings
from millstream.dashboard import feed as feed_module
from millstream.dashboard.feed import Feed
from millstream.dashboard.reading import Look
from millstream.errors import BrokerUnavailableError
from tests.dashboard.looks import make_look, make_view

pytestmark = pytest.mark.anyio
SETTINGS = Settings("redis://127.0.0.1:1")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Source:
    """Stands in for the server: counts the looks, and fails while `error` is set."""

    def __init__(self) -> None:
        self.looks = 0
        self.error: Exception | None = None
        self.arrivals = 0

    async def __call__(self) -> Look:
        self.looks += 1
        await anyio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        view = make_view(backlog=Backlog(arrivals=self.arrivals, waiting=self.arrivals))
        return make_look(view, at_ms=self.looks * 1000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def feed(source: Source, clock: Clock) -> Feed:
    return Feed(SETTINGS, source, clock=clock)


async def test_clients_that_ask_at_the_same_time_share_one_look(feed: Feed, source: Source) -> None:
    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(feed.latest)

    assert source.looks == 1


async def test_nobody_asks_nothing_is_read(feed: Feed, source: Source, clock: Clock) -> None:
    await feed.latest()
    clock.now_s += 3600

    assert source.looks == 1


async def test_look_is_renewed_after_a_poll_and_says_its_age_before(feed: Feed, source: Source, clock: Clock) -> None:
    await feed.latest()

    clock.now_s += 0.5
    assert (await feed.latest()).age_s == 0.5
    clock.now_s += 0.5
    assert (await feed.latest()).age_s == 0.0
    assert source.looks == 2


async def test_rates_come_with_the_second_look(feed: Feed, source: Source, clock: Clock) -> None:
    before = (await feed.latest()).snapshot
    source.arrivals, clock.now_s = 30, clock.now_s + 1
    after = (await feed.latest()).snapshot

    assert before is not None and before.deployments[0].arrivals_per_s is None
    assert after is not None and after.deployments[0].arrivals_per_s == 30.0


async def test_outage_shows_what_was_known_with_its_age_and_the_reason(
    feed: Feed, source: Source, clock: Clock
) -> None:
    known = (await feed.latest()).snapshot
    source.error, clock.now_s = BrokerUnavailableError("cannot reach the server"), clock.now_s + 7

    latest = await feed.latest()

    assert (latest.snapshot, latest.age_s, latest.error) == (known, 7.0, "cannot reach the server")


async def test_outage_from_the_start_has_no_snapshot(feed: Feed, source: Source) -> None:
    source.error = BrokerUnavailableError("cannot reach the server")

    latest = await feed.latest()

    assert (latest.snapshot, latest.age_s, latest.error) == (None, None, "cannot reach the server")


async def test_outage_is_not_asked_about_more_often_than_a_poll(feed: Feed, source: Source) -> None:
    source.error = BrokerUnavailableError("cannot reach the server")

    await feed.latest()
    await feed.latest()

    assert source.looks == 1


async def test_recovery_is_shown_at_the_next_poll(feed: Feed, source: Source, clock: Clock) -> None:
    source.error = BrokerUnavailableError("cannot reach the server")
    await feed.latest()
    source.error, clock.now_s = None, clock.now_s + 1

    latest = await feed.latest()

    assert latest.snapshot is not None and latest.error == ""


async def test_outage_is_logged_once(
    feed: Feed, source: Source, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    source.error = BrokerUnavailableError("cannot reach the server")

    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            clock.now_s += 1
            await feed.latest()

    assert len(caplog.records) == 1


async def test_server_that_does_not_answer_is_an_outage(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(feed_module, "READ_TIMEOUT_S", 0.01)
    feed = Feed(SETTINGS, anyio.sleep_forever, clock=clock)  # type: ignore[arg-type]  # never returns a Look

    assert "did not answer" in (await feed.latest()).error


async def test_record_that_cannot_be_read_is_shown_and_logged_with_its_traceback(
    feed: Feed, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    source.error = TypeError("AppRecord() got an unexpected keyword argument 'colour'")

    latest = await feed.latest()

    assert "cannot be shown: TypeError: AppRecord() got an unexpected keyword" in latest.error
    assert any(record.exc_info for record in caplog.records)


async def test_client_that_gives_up_leaves_the_others_their_look(clock: Clock) -> None:
    waiting = anyio.Event()
    look = _slow_once(waiting)
    feed = Feed(SETTINGS, look, clock=clock)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(feed.latest)
        await waiting.wait()
        tasks.cancel_scope.cancel()

    assert (await feed.latest()).error == ""


def _slow_once(waiting: anyio.Event) -> Callable[[], Awaitable[Look]]:
    async def look() -> Look:
        if not waiting.is_set():
            waiting.set()
            await anyio.sleep_forever()
        return make_look()

    return look
