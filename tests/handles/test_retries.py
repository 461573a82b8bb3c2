"""Requests whose code raises are tried again, as the deployment or the caller says, and no more often than that."""

import asyncio
import json
import random
import threading
from typing import Any

import pytest

from millstream import SyncHandle, serve
from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys
from millstream.broker.pickling import LARGE_BYTES
from millstream.broker.states import State
from millstream.errors import (
    ConfigError,
    MillstreamError,
    RequestCancelledError,
    RequestTimeoutError,
    SerializationError,
    TaskError,
)
from millstream.retry import Retry
from tests.helpers import wait_until
from tests.replica_helpers import Serving

pytestmark = pytest.mark.anyio

AT_ONCE = Retry(max_retries=3, backoff_s=0.01)


class Busy(Exception):
    """What a model may raise when asked too often."""


class Model:
    """Fails as often as it is told; counts how often it is called."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def __call__(self, failures: int, error: type[BaseException] = Busy) -> int:
        await asyncio.sleep(0)
        return self._try(failures, error)

    async def at_once(self, failures: int) -> int:
        return self._try(failures, Busy)

    def in_a_thread(self, failures: int) -> int:
        return self._try(failures, Busy)

    async def a_lock(self) -> Any:
        return threading.Lock()

    async def count(self, failures: int) -> Any:
        yield 1
        yield self._try(failures, Busy)

    def _try(self, failures: int, error: type[BaseException]) -> int:
        self.calls.append(failures)
        if len(self.calls) <= failures:
            raise error(f"call {len(self.calls)}")
        return len(self.calls)


@pytest.mark.parametrize("method", ["__call__", "at_once", "in_a_thread"])
async def test_request_is_tried_again_until_it_succeeds(serving: Serving, method: str) -> None:
    handle = serving(Model, retry=AT_ONCE).options(method_name=method)

    assert await handle.call(3) == 4


@pytest.mark.parametrize("method", ["__call__", "at_once", "in_a_thread"])
async def test_last_error_is_the_result_and_says_how_often_it_was_tried(serving: Serving, method: str) -> None:
    handle = serving(Model, retry=AT_ONCE).options(method_name=method)

    with pytest.raises(Busy, match="call 4") as caught:
        await handle.call(100)

    assert isinstance(caught.value, TaskError)
    assert ", retry 3)" in str(caught.value)


async def test_nothing_is_tried_again_unless_it_is_asked_for(serving: Serving) -> None:
    handle = serving(Model)

    with pytest.raises(Busy, match="call 1"):
        await handle.call(1)
    assert await handle.call(0) == 2


async def test_caller_decides_otherwise_than_the_deployment(serving: Serving) -> None:
    never, often = serving(Model, retry=AT_ONCE).options(retry=0), serving(Model).options(retry=AT_ONCE)

    with pytest.raises(Busy, match="call 1"):
        await never.call(1)
    assert await often.call(2) == 3


@pytest.mark.parametrize(
    ("rule", "error", "is_tried_again"),
    [
        (Retry(1, on=Busy, backoff_s=0), Busy, True),
        (Retry(1, on="tests.handles.test_retries.Busy", backoff_s=0), Busy, True),
        (Retry(1, on=("OSError", Busy), backoff_s=0), ConnectionResetError, True),
        (Retry(1, on=OSError, backoff_s=0), Busy, False),
        (Retry(1, but_not=OSError, backoff_s=0), ConnectionResetError, False),
        (Retry(1, but_not=OSError, backoff_s=0), Busy, True),
        (Retry(1, backoff_s=0), SystemExit, False),
    ],
)
async def test_rule_names_exceptions(
    serving: Serving, rule: Retry, error: type[BaseException], is_tried_again: bool
) -> None:
    handle = serving(Model, retry=rule)

    if is_tried_again:
        assert await handle.call(1, error) == 2
    else:
        with pytest.raises(TaskError):
            await handle.call(1, error)


async def test_what_is_no_fault_of_its_code_is_not_tried_again(serving: Serving) -> None:
    """Arguments that do not fit, and results that cannot be pickled, would be the same the next time."""
    handle = serving(Model, retry=Retry(5, backoff_s=60))

    with pytest.raises(MillstreamError, match="no method 'nothing'"):
        await handle.nothing.call()
    with pytest.raises(SerializationError):
        await handle.a_lock.call()


async def test_downstream_error_is_tried_again_by_its_class(serving: Serving) -> None:
    inner = serving(Model)

    class Outer:
        async def __call__(self) -> int:
            count: int = await inner.call(2)
            return count

    outer = serving(Outer, retry=Retry(3, on=Busy, backoff_s=0.01))

    assert await outer.call() == 3


async def test_pause_holds_no_slot_and_can_be_seen(serving: Serving, redis: Control) -> None:
    handle = serving(Model, max_ongoing_requests=1, retry=Retry(1, backoff_s=60, jitter=0))
    waiting = await handle.remote(1)

    async def is_delayed() -> bool:
        return await waiting.astatus() is State.DELAYED

    await wait_until(is_delayed)

    assert await handle.call(0) == 2

    keys = DeploymentKeys("ms", "app.Model")
    assert await redis.hlen(keys.held) == 1
    await waiting.acancel()
    with pytest.raises(RequestCancelledError):
        await waiting


async def test_deadline_holds_for_all_attempts_together(serving: Serving) -> None:
    handle = serving(Model, retry=Retry(1000, backoff_s=0.05, factor=1))

    with pytest.raises(RequestTimeoutError):
        await handle.options(timeout_s=0.3).call(1000)


async def test_dependants_wait_for_the_last_attempt(serving: Serving) -> None:
    handle, plus = serving(Model, retry=AT_ONCE), serving(increase)

    assert await plus.call(handle.remote(2)) == 4


async def test_large_arguments_are_there_again(serving: Serving) -> None:
    class Keeper:
        def __init__(self) -> None:
            self.calls = 0

        async def __call__(self, data: bytes) -> int:
            self.calls += 1
            if self.calls < 3:
                raise Busy
            return len(data)

    handle = serving(Keeper, retry=AT_ONCE)

    assert await handle.call(b"x" * (LARGE_BYTES + 1)) == LARGE_BYTES + 1


async def test_stream_goes_on_where_it_was(serving: Serving) -> None:
    handle = serving(Model, retry=AT_ONCE)

    assert [item async for item in handle.count.stream(2)] == [1, 3]


def test_sync_handles_retry_as_well(serving: Serving) -> None:
    handle = serving.sync(Model, retry=2)
    assert isinstance(handle, SyncHandle)

    assert handle.options(retry=AT_ONCE).call(2) == 3


async def increase(x: int) -> int:
    return x + 1


# the rule


@pytest.fixture
def chance() -> random.Random:
    return random.Random(7)


def test_pauses_double_to_their_limit(chance: random.Random) -> None:
    rule = Retry(10, backoff_s=1, max_backoff_s=10, jitter=0)

    assert [rule.delay_s(retries, chance) for retries in range(6)] == [1, 2, 4, 8, 10, 10]
    assert rule.delay_s(10**6, chance) == 10


def test_jitter_takes_a_random_share_away(chance: random.Random) -> None:
    rule = Retry(10, backoff_s=8, jitter=0.25)

    delays = [rule.delay_s(0, chance) for _ in range(1000)]

    assert 6 <= min(delays) < 6.1 and 7.9 < max(delays) <= 8


@pytest.mark.parametrize(
    "rule", [Retry(), Retry(7, on=(Busy, "OSError"), but_not="builtins.TimeoutError", backoff_s=0.5, jitter=1)]
)
def test_rule_travels_as_json(rule: Retry) -> None:
    assert Retry.from_json(rule.to_json()) == rule
    assert json.loads(rule.to_json())["max_retries"] == rule.max_retries


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"max_retries": -1}, "max_retries=-1"),
        ({"max_retries": True}, "max_retries=True"),
        ({"max_retries": 1.5}, "max_retries=1.5"),
        ({"backoff_s": -1}, "backoff_s=-1 must be a number, 0 or more"),
        ({"backoff_s": float("nan")}, "backoff_s=nan"),
        ({"factor": 0.5}, "factor=0.5 must be a number, from 1 to 1000"),
        ({"jitter": 2}, "jitter=2 must be a number, from 0 to 1"),
        ({"on": 3}, "on=3 must be exception classes"),
        ({"on": [int]}, "which is no exception class"),
        ({"but_not": ""}, "which is no exception class"),
        ({"max_attempts": 3}, "retry has no 'max_attempts'; known are max_retries, "),
    ],
)
def test_mistake_in_a_rule_is_named(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint.replace("(", r"\(")):
        serve.deployment(retry=wrong)(Model)


@pytest.mark.parametrize("wrong", ["often", True, [3]])
def test_rule_of_another_kind_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be a serve\.Retry, a number of retries, or a dict"):
        serve.deployment(retry=wrong)(Model)
    with pytest.raises(ConfigError, match=r"must be a serve\.Retry, a number of retries, or a dict"):
        SyncHandle("Model").options(retry=wrong)
