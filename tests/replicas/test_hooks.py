"""The hooks of a user's class: async ones on the loop, sync ones in threads of their own."""

import asyncio
import threading
from typing import Any

import pytest

from millstream.errors import ConfigError
from millstream.replicas.hooks import Hooks

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
