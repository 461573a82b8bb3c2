"""Deadlines when something is wrong: clocks, a server that is down or answers nobody, very many at once."""

import asyncio
import subprocess
from typing import Any

import pytest

from millstream import serve
from millstream.broker.keys import DeploymentKeys
from millstream.config import Settings
from millstream.errors import ConfigError, RequestTimeoutError
from millstream.handles import deadlines, endings, engines
from millstream.handles.handle import DeploymentHandle, SyncHandle
from tests.handles.held import TIMEOUT_S, Model, Notes, in_time
from tests.helpers import wait_until
from tests.replica_helpers import Serving
from tests.servers import Server
from tests.timing import timed

pytestmark = pytest.mark.anyio


# the clock


@timed
async def test_server_decides_whose_clock_is_ahead(serving: Serving, keys: DeploymentKeys) -> None:
    handle = serving(Model)
    await handle.echo.call("connected")

    with in_time():
        future = handle.options(timeout_s=TIMEOUT_S).call("it")
        engines.current().deadlines.add(keys.tag, future.ref, 0.01)  # type: ignore[attr-defined]
        await future


@pytest.mark.parametrize("ahead_ms", [10_000, -10_000])
@timed
async def test_clock_of_a_replica_that_is_wrong_ends_nothing_early_and_nothing_late(
    serving: Serving, notes: Notes, monkeypatch: pytest.MonkeyPatch, ahead_ms: int
) -> None:
    handle = serving(Model, notes)
    clock = serving._hosted[0].replica._clock
    now_ms = clock.now_ms
    monkeypatch.setattr(clock, "now_ms", lambda: now_ms() + ahead_ms)
    await handle.echo.call("connected")

    with in_time():
        await handle.options(timeout_s=TIMEOUT_S).call("it")

    assert notes.started == ["it"]


# a server that is not there


@timed
async def test_deadline_holds_while_the_server_is_down(own_server: Server, serving_there: Serving) -> None:
    handle = serving_there(Model)
    running = await handle.options(timeout_s=1).remote("running")

    own_server.kill()
    with in_time():
        await handle.options(timeout_s=TIMEOUT_S).call("unsent")
    with pytest.raises(RequestTimeoutError, match="not reachable"):
        await asyncio.wait_for(running, 2)


@timed
async def test_deadline_holds_while_the_server_answers_nobody(
    own_server: Server, serving_there: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "ANSWERS_WITHIN_S", 0.2)
    handle = serving_there(Model)
    await handle.echo.call("connected")

    own_server.freeze()
    with in_time(slack_s=0.5) as caught:
        await handle.options(timeout_s=TIMEOUT_S).call("in the air")
    own_server.thaw()

    assert "not reachable" in str(caught.value)


async def test_request_that_timed_out_unsent_is_not_sent_later(
    own_server: Server, serving_there: Serving, notes: Notes
) -> None:
    handle = serving_there(Model, notes)
    upstream = await handle.echo.remote(1)
    assert await upstream == 1

    own_server.kill()
    hurried = handle.options(timeout_s=0.2)
    ways = [hurried.call(1), hurried.call(b"x" * 1_000_000), hurried.take.call(upstream)]
    errors = await asyncio.gather(*ways, return_exceptions=True)
    own_server.start()

    assert [type(error) for error in errors] == [RequestTimeoutError] * 3
    assert await asyncio.wait_for(handle.echo.call("after"), 10) == "after"
    assert notes.started == []


@pytest.mark.parametrize("how", ["plain", "large", "parked", "patient"])
@timed
async def test_time_counts_from_the_call_and_not_from_when_the_server_came_back(
    own_server: Server, serving_there: Serving, notes: Notes, how: str
) -> None:
    handle = serving_there(Model, notes)
    upstream = await handle.remote("upstream")
    make = {
        "plain": lambda handle: handle.call("it"),
        "large": lambda handle: handle.call(b"x" * 1_000_000),
        "parked": lambda handle: handle.take.call(upstream),
        "patient": lambda handle: handle.options(when_full="wait").call("it"),
    }

    own_server.kill()
    with in_time(1.5):
        future = make[how](handle.options(timeout_s=1.5))
        await asyncio.sleep(0.5)
        own_server.start()
        await future


@timed
async def test_deadline_ends_the_wait_for_a_first_connection(settings: Settings) -> None:
    engines.use(settings)
    engine = engines.current()
    engine.lines._dial_both = lambda: asyncio.sleep(60)  # type: ignore[method-assign]

    with in_time():
        await DeploymentHandle("Model", "app").options(timeout_s=TIMEOUT_S).call(1)

    engines.close_all()


# many


async def test_many_that_time_out_at_once_take_few_calls(serving: Serving) -> None:
    handle = serving.deploy_only(Model)
    await handle.options(block_until="queued").remote("connected")
    lines, calls = engines.current().lines, list[str]()
    run_there = lines.run

    def counted(call: Any) -> Any:
        calls.append(call.script.name)
        return run_there(call)

    lines.run = counted  # type: ignore[method-assign]

    futures = [handle.options(timeout_s=0.5).call(x) for x in range(1000)]
    errors = await asyncio.gather(*futures, return_exceptions=True)

    assert {type(error) for error in errors} == {RequestTimeoutError}
    assert calls.count("cancel") < 500


async def test_deadlines_of_what_has_ended_are_forgotten(serving: Serving) -> None:
    handle = serving(Model).options(timeout_s=60)

    for _ in range(30):
        await asyncio.gather(*[handle.echo.call(x) for x in range(200)])

    assert len(engines.current().deadlines._heap) <= deadlines.SLACK + 200


def test_timer_is_set_for_the_first_deadline_whatever_their_order() -> None:
    async def story() -> list[tuple[str, list[bytes]]]:
        told: list[tuple[str, list[bytes]]] = []
        some = deadlines.Deadlines(
            asyncio.get_running_loop(), {b"a", b"b", b"c"}, lambda tag, refs: told.append((tag, refs))
        )
        for ref, in_s in ((b"c", 0.06), (b"a", 0.02), (b"gone", 0.03), (b"b", 0.02), (b"a", 0.02)):
            some.add("app.X", ref, in_s)
        await asyncio.sleep(0.1)
        assert not some
        return told

    told = asyncio.run(story())

    assert sorted(ref for _, refs in told[:-1] for ref in refs) == [b"a", b"b"]
    assert told[-1] == ("app.X", [b"c"])


# options


@pytest.mark.parametrize("timeout_s", [0, -1, float("inf"), float("nan"), "1", True])
def test_timeout_must_be_a_time(timeout_s: Any) -> None:
    with pytest.raises(ConfigError, match="timeout_s="):
        DeploymentHandle("Model").options(timeout_s=timeout_s)


def test_timeout_within_the_delay_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"timeout_s=5 .* delay_s=10"):
        DeploymentHandle("Model").options(timeout_s=5, delay_s=10)


async def test_code_that_asks_learns_that_its_time_is_up(serving: Serving) -> None:
    class Patient:
        async def __call__(self) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                seen.append(serve.get_request_context().is_cancelled)

    seen: list[bool] = []

    with pytest.raises(RequestTimeoutError):
        await serving(Patient).options(timeout_s=0.1).call()

    await wait_until(lambda: seen == [True])


def test_error_says_what_to_do(serving: Serving) -> None:
    handle = serving.deploy_only(Model)

    with pytest.raises(RequestTimeoutError, match="longer timeout_s") as caught:
        SyncHandle(handle.deployment_name, handle.app_name).options(timeout_s=0.05).call(1)

    assert caught.value.ref_id.startswith("app.Model~")
    assert isinstance(caught.value, TimeoutError)
    assert not isinstance(caught.value, subprocess.TimeoutExpired)
