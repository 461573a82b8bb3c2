"""Cancelling what the server may not have yet: not sent, in the air, or lost with its connection."""

import asyncio
import time
from typing import Any

import pytest

from millstream.config import Settings
from millstream.errors import BrokerUnavailableError, RequestCancelledError
from millstream.handles import endings, engines
from tests.handles.elsewhere import run_elsewhere
from tests.handles.held import Model, Notes
from tests.helpers import wait_until
from tests.replica_helpers import Serving
from tests.servers import Server
from tests.timing import timed

pytestmark = pytest.mark.anyio


# not sent yet


async def test_request_made_before_there_is_a_connection_is_cancelled_and_not_sent(
    serving: Serving, notes: Notes
) -> None:
    handle = serving(Model, notes)

    task = handle.remote(1)
    was_cancelled = await task.ref.acancel()

    assert was_cancelled is True
    with pytest.raises(RequestCancelledError):
        await (await task)
    assert await handle.echo.call("after") == "after"
    assert notes.started == []


async def test_request_in_the_air_is_cancelled(serving: Serving, notes: Notes) -> None:
    handle = serving(Model, notes, max_ongoing_requests=1)
    await handle.remote("first")

    task = handle.remote(1)
    was_cancelled = await task.ref.acancel()

    assert was_cancelled is True
    with pytest.raises(RequestCancelledError):
        await (await task)
    notes.gate.open()
    assert await handle.echo.call("after") == "after"
    assert notes.started == ["first"]


@pytest.mark.parametrize("how", ["plain", "delayed", "dependent", "large"])
@timed
async def test_request_made_while_the_server_is_down_is_cancelled_at_once_and_not_sent_later(
    own_server: Server, serving_there: Serving, how: str, notes: Notes
) -> None:
    handle = serving_there(Model, notes)
    upstream = await handle.echo.remote(0)
    assert await upstream == 0
    link = engines.current().lines.commands
    assert link is not None
    own_server.kill()
    await asyncio.wait([link.lost])
    await wait_until(lambda: engines.current().lines.commands is not link)

    make = {
        "plain": lambda: handle.remote(1),
        "delayed": lambda: handle.options(delay_s=0.01).remote(1),
        "dependent": lambda: handle.take.remote(upstream),
        "large": lambda: handle.remote(b"x" * 1_000_000),
    }
    task = make[how]()
    started = time.monotonic()
    was_cancelled = await task.ref.acancel()

    assert was_cancelled is True
    assert time.monotonic() - started < 0.5
    with pytest.raises(RequestCancelledError):
        await (await task)
    own_server.start()
    assert await asyncio.wait_for(handle.echo.call("after"), 10) == "after"
    assert notes.started == []


async def test_request_that_waits_here_for_another_one_to_be_sent_is_cancelled(
    own_server: Server, serving_there: Serving, notes: Notes
) -> None:
    handle = serving_there(Model, notes)
    await handle.echo.call(0)
    own_server.freeze()
    large = b"x" * 100_000  # in a key of its own, which the server must have first
    upstream = handle.echo.remote(large)
    waiting = handle.take.remote(upstream)

    was_cancelled = await asyncio.wait_for(waiting.ref.acancel(), 1)
    own_server.thaw()

    assert was_cancelled is True
    assert await asyncio.wait_for(upstream.ref, 5) == large
    with pytest.raises(RequestCancelledError):
        await (await waiting)
    assert notes.started == []


async def test_request_whose_submit_got_lost_with_its_connection_is_cancelled_for_good(
    own_server: Server, serving_there: Serving, notes: Notes
) -> None:
    handle = serving_there(Model, notes)
    await handle.echo.call(0)
    engine = engines.current()
    assert engine.lines.commands is not None
    own_server.freeze()

    task = handle.remote(1)  # the server has it in a buffer of its socket
    engine.lines.commands.close()
    cancelling = asyncio.create_task(task.ref.acancel())
    await asyncio.sleep(0.1)
    assert not cancelling.done(), "the server may have it, and is not there to be asked"
    own_server.thaw()

    assert await asyncio.wait_for(cancelling, 10) is True
    with pytest.raises(RequestCancelledError):
        await asyncio.wait_for(task.ref, 5)
    assert await handle.echo.call("after") == "after"
    await wait_until(lambda: notes.started == notes.cancelled, what="nothing goes on")


async def test_request_that_is_overtaken_by_its_cancel_does_not_run(serving: Serving, notes: Notes) -> None:
    handle = serving(Model, notes)
    await handle.echo.call(0)
    engine = engines.current()
    commands, held = engine.lines.commands, []
    assert commands is not None
    start, is_held = commands.start, True

    def hold_up(call: Any, callback: Any) -> None:
        if is_held and call.script.name == "submit":
            held.append((call, callback))
        else:
            start(call, callback)

    commands.start = hold_up  # type: ignore[method-assign]
    task = handle.remote(1)

    was_cancelled = await asyncio.wait_for(task.ref.acancel(), 1)
    is_held = False
    for call, callback in held:
        start(call, callback)

    assert held and was_cancelled is True
    with pytest.raises(RequestCancelledError):
        await (await task)
    assert await handle.echo.call("after") == "after"
    assert notes.started == []


async def test_cancel_waits_for_the_server_to_come_back(
    own_server: Server, serving_there: Serving, notes: Notes
) -> None:
    ref = await serving_there(Model, notes).remote(1)

    own_server.kill()
    cancelling = asyncio.create_task(ref.acancel())
    await asyncio.sleep(0.1)
    own_server.start()

    assert await asyncio.wait_for(cancelling, 10) is True
    with pytest.raises(RequestCancelledError):
        await asyncio.wait_for(ref, 5)
    await wait_until(lambda: notes.cancelled == [1])


async def test_cancel_gives_up_on_a_server_that_does_not_come_back(
    own_server: Server, serving_there: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = await serving_there(Model).remote(1)
    monkeypatch.setattr(endings, "PATIENCE_S", 0.1)
    monkeypatch.setattr("millstream.handles.lines.PATIENCE_S", 0.1)

    own_server.kill()

    with pytest.raises(BrokerUnavailableError):
        await asyncio.wait_for(ref.acancel(), 5)


async def test_cancel_whose_answer_got_lost_is_still_known_to_have_done_it(serving: Serving) -> None:
    ref = await serving(Model).remote(1)
    engine = engines.current()
    commands = engine.lines.commands
    assert commands is not None
    run = commands.run

    def lose_the_answer(call: Any) -> Any:
        answer = run(call)
        return lost(answer) if call.script.name == "cancel" else answer

    async def lost(answer: "asyncio.Future[Any]") -> None:
        await answer
        commands.close()
        raise BrokerUnavailableError("lost")

    commands.run = lose_the_answer  # type: ignore[method-assign]

    assert await asyncio.wait_for(ref.acancel(), 5) is True

    with pytest.raises(RequestCancelledError):
        await asyncio.wait_for(ref, 5)


# the task of `remote`


@pytest.mark.parametrize("when", ["at once", "later", "by wait_for"])
async def test_cancelling_the_task_before_the_match_cancels_the_request(
    serving: Serving, when: str, notes: Notes
) -> None:
    handle = serving(Model, notes, max_ongoing_requests=1)
    first = await handle.remote("first")

    task = handle.remote("second")
    match when:
        case "at once":
            task.cancel()
        case "later":
            await asyncio.sleep(0.05)
            task.cancel()
        case _:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(task, 0.05)

    with pytest.raises(RequestCancelledError):
        await asyncio.wait_for(task.ref, 5)
    assert task.cancelled()
    notes.gate.open()
    assert await first == "first"
    assert await handle.echo.call("after") == "after"
    assert notes.started == ["first"]


async def test_cancelling_the_task_after_the_match_does_nothing(serving: Serving, notes: Notes) -> None:
    task = serving(Model, notes).remote(1)
    ref = await task

    assert task.cancel() is False
    notes.gate.open()

    assert await ref == 1


async def test_cancelling_the_task_of_a_parked_request_does_nothing_more(serving: Serving, notes: Notes) -> None:
    handle = serving(Model, notes)
    task = handle.take.remote(handle.remote(1))
    await task

    task.cancel()
    notes.gate.open()

    assert await asyncio.wait_for(task.ref, 5) == (1,)


async def test_loop_that_ends_with_unmatched_requests_ends_in_silence(serving: Serving, settings: Settings) -> None:
    serving.deploy_only(Model)
    code = """
        import asyncio
        from millstream.handles.handle import DeploymentHandle

        async def main():
            asyncio.get_running_loop().slow_callback_duration = 60  # says nothing of a slow machine
            handle = DeploymentHandle("Model", "app")
            await handle.options(block_until="queued").remote(0)
            for x in range(5):
                handle.remote(x)
            await asyncio.sleep(0.05)

        asyncio.run(main(), debug=True)
        """

    ran = await run_elsewhere(settings, code, "-X", "dev")

    assert ran.stderr == ""
