"""The hooks of a user's class: async ones on the loop, sync ones in threads of their own; and the last one, `__del__`."""

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from millstream.errors import ConfigError
from millstream.replicas.hooks import Hooks
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Stage

pytestmark = pytest.mark.anyio


class Sync:
    def __init__(self, raises: BaseException | None = None) -> None:
        self.raises, self.seen = raises, list[Any]()

    def reconfigure(self, config: Any) -> None:
        self.seen.append((config, threading.current_thread() is threading.main_thread()))
        if self.raises:
            raise self.raises


class Async(Sync):
    async def reconfigure(self, config: Any) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().reconfigure(config)


class ReturnsACoroutine(Async):
    def reconfigure(self, config: Any) -> Any:
        return super().reconfigure(config)


@pytest.mark.parametrize(("kind", "is_on_the_loop"), [(Sync, False), (Async, True), (ReturnsACoroutine, True)])
async def test_hook_is_called_where_it_holds_nobody_up(kind: type[Sync], is_on_the_loop: bool) -> None:
    instance = kind()

    await Hooks(instance).reconfigure({"n": 1})

    assert instance.seen == [({"n": 1}, is_on_the_loop)]


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()])
@pytest.mark.parametrize("kind", [Sync, Async])
async def test_what_a_hook_raises_is_raised(kind: type[Sync], error: BaseException) -> None:
    raised: BaseException | None = None
    try:
        await Hooks(kind(error)).reconfigure(1)
    except BaseException as e:
        raised = e

    assert raised is error


async def test_stop_iteration_in_a_thread_is_an_error_like_any_other() -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        await Hooks(Sync(StopIteration("x"))).reconfigure(1)


def function() -> None:
    """Has no hooks, though its type has a `__del__` or not."""


@pytest.mark.parametrize(("target", "name"), [(object(), "object"), (function, "function")])
async def test_user_config_without_reconfigure_is_said_by_name(target: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"user_config is set, but {name} has no method reconfigure"):
        await Hooks(target).reconfigure(1)


@pytest.mark.parametrize("target", [object(), function])
async def test_what_is_not_there_is_not_called(target: Any) -> None:
    hooks = Hooks(target)

    await hooks.check_health()
    await hooks.say_goodbye("r-1")

    assert not hooks.has_check_health


# goodbye


class Leaves:
    """The interpreter calls `__del__`, too, when the test lets go of it: that call is none of ours."""

    def __init__(self, do: Callable[[], None], gate: Gate | None = None) -> None:
        self.do, self.gate, self.is_over = do, gate or Gate(), False

    async def __call__(self) -> None:
        await self.gate.wait()

    def __del__(self) -> None:
        if not self.is_over:
            self.is_over = True
            self.do()


async def test_del_is_called_once_all_requests_have_ended(stage: Stage) -> None:
    gate, order = Gate(), list[str]()
    replica = await stage.start(Leaves, lambda: order.append("left"), gate)
    future = stage.handle.call()
    await wait_until(lambda: gate.inside == 1)
    future.add_done_callback(lambda _: order.append("answered"))

    draining = asyncio.create_task(replica.drain())
    await wait_until(lambda: replica.replica._intake is not None and replica.replica._intake.is_draining)
    assert order == []
    gate.open()

    assert await draining == 0
    await future
    assert sorted(order) == ["answered", "left"] and order.count("left") == 1


class LeavesSlowly:
    left: list[str] = []  # noqa: RUF012 - outlives its instance

    def __call__(self) -> None: ...

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.left.append("closed")


LeavesSlowly.__del__ = LeavesSlowly.close  # type: ignore[attr-defined]


async def test_del_may_be_a_coroutine(stage: Stage) -> None:
    replica = await stage.start(LeavesSlowly)

    await replica.drain()
    del LeavesSlowly.__del__  # type: ignore[attr-defined] # the interpreter would not await it

    assert LeavesSlowly.left == ["closed"]


async def test_error_in_del_is_logged_and_the_replica_leaves_in_order(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise OSError("cannot close")

    replica = await stage.start(Leaves, fail)

    with caplog.at_level(logging.ERROR):
        code = await replica.drain()

    assert code == 0
    (record,) = caplog.records
    assert f"the __del__ of replica {replica.name} of app.Model raised OSError: cannot close" in record.getMessage()


async def test_del_that_does_not_end_is_left_at_the_deadline(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    replica = await stage.start(Leaves, gate.wait_in_thread, graceful_shutdown_timeout_s=0.2)

    code = await replica.drain()
    gate.open()

    assert code == 0
    assert "was still running at the deadline" in caplog.text
