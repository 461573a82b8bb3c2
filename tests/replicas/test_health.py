"""check_health: asked before a replica is ready and every so often after that; three failures in a row are too many."""

import asyncio
import threading
import time
from typing import Any

import pytest

from millstream.config import DeploymentConfig
from millstream.replicas import health as health_module
from millstream.replicas.health import Health, check
from millstream.replicas.hooks import Hooks
from tests.helpers import wait_until
from tests.replica_helpers import Gate, Stage

pytestmark = pytest.mark.anyio


class Model:
    """As healthy as it is told."""

    def __init__(self) -> None:
        self.is_ill = False
        self.checks = 0

    async def check_health(self) -> None:
        self.checks += 1
        if self.is_ill:
            raise OSError("no GPU")

    async def __call__(self) -> None: ...

    async def fall_ill(self) -> None:
        self.is_ill = True


def make(instance: Any, *, is_paused: bool = False, **options: Any) -> Health:
    config = DeploymentConfig().updated(options)
    return Health(Hooks(instance), lambda: config, lambda: is_paused)


class Listener:
    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []

    async def __call__(self, message: dict[str, Any]) -> None:
        self.heard.append(message)


# one check


async def test_error_is_a_complaint_with_its_traceback() -> None:
    model = Model()
    model.is_ill = True

    complaint = await check(Hooks(model), 5)

    assert complaint is not None
    assert complaint.text == "OSError: no GPU" and 'raise OSError("no GPU")' in complaint.traceback


class Raises:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def check_health(self) -> None:
        raise self.error


class RaisesAsync(Raises):
    async def check_health(self) -> None:  # type: ignore[override]
        raise self.error


@pytest.mark.parametrize("kind", [Raises, RaisesAsync])
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
async def test_check_that_exits_is_a_failure_and_ends_nothing(kind: type[Raises], error: BaseException) -> None:
    assert await check(Hooks(kind(error)), 5) is not None


async def test_check_that_hangs_is_a_failure_after_the_timeout() -> None:
    class Hangs:
        async def check_health(self) -> None:
            await asyncio.Event().wait()

    complaint = await check(Hooks(Hangs()), 0.02)

    assert complaint is not None and complaint.text == "no answer within health_check_timeout_s=0.02"


async def test_check_that_hangs_in_its_thread_is_a_failure_after_the_timeout() -> None:
    gate = Gate()

    class Hangs:
        def check_health(self) -> None:
            gate.wait_in_thread()

    complaint = await check(Hooks(Hangs()), 0.02)
    gate.open()

    assert complaint is not None and "no answer" in complaint.text


async def test_answer_counts_though_the_loop_was_busy_with_user_code_all_the_while() -> None:
    answered = threading.Event()

    class Busy:
        def check_health(self) -> None:
            answered.set()

    checking = asyncio.create_task(check(Hooks(Busy()), 0.05))
    while not answered.is_set():  # noqa: ASYNC110 - the answer must be under way, and not read
        await asyncio.sleep(0)
    time.sleep(0.1)  # noqa: ASYNC251 - user code that blocks the loop beyond the timeout

    assert await checking is None


# one after the other


async def test_three_failures_in_a_row_are_too_many(caplog: pytest.LogCaptureFixture) -> None:
    model, say = Model(), Listener()
    model.is_ill = True

    await make(model, health_check_period_s=0.001).run(say)

    (message,) = say.heard
    assert message["unhealthy"] == "its check_health failed 3 times in a row, at last with OSError: no GPU"
    assert 'raise OSError("no GPU")' in message["traceback"]
    assert model.checks == 3
    assert "check_health failed (2 of 3): OSError: no GPU" in caplog.text


async def test_one_success_in_between_makes_good_for_two_failures() -> None:
    model = Model()
    health = make(model)

    for is_ill in (True, True, False, True, True):
        model.is_ill = is_ill
        await health.step()

    assert health._failures == 2


async def test_while_the_object_is_reconfigured_nothing_counts() -> None:
    model = Model()
    model.is_ill = True
    health = make(model, is_paused=True)

    assert [await health.step() for _ in range(5)] == [None] * 5
    assert model.checks == 0


async def test_without_check_health_nothing_runs() -> None:
    say = Listener()

    await make(object(), health_check_period_s=3600).run(say)

    assert say.heard == []


async def test_shorter_period_counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "LOOK_S", 0.01)
    model, config = Model(), DeploymentConfig(health_check_period_s=3600)
    health = Health(Hooks(model), lambda: config, lambda: False)
    running = asyncio.create_task(health.run(Listener()))
    await asyncio.sleep(0)

    config = DeploymentConfig(health_check_period_s=0.01)

    await wait_until(lambda: model.checks > 3)
    running.cancel()


# in a replica


async def test_replica_that_fails_its_first_check_is_not_ready(stage: Stage) -> None:
    class Ill(Model):
        def __init__(self) -> None:
            super().__init__()
            self.is_ill = True

    replica = await stage.prepare(Ill)
    replica.begin()
    await wait_until(lambda: bool(replica.heard))

    assert await replica.end() == 1
    (message,) = replica.heard
    assert message["failed"] == "its first check_health failed: OSError: no GPU"
    assert "raise OSError" in message["traceback"]


async def test_replica_that_falls_ill_says_so(stage: Stage) -> None:
    replica = await stage.start(Model, health_check_period_s=0.01)

    await stage.handle.fall_ill.call()

    message = await replica.hears("unhealthy")
    assert "failed 3 times in a row" in message["unhealthy"]


async def test_check_is_made_however_busy_the_threads_of_the_methods_are(stage: Stage) -> None:
    checks = threading.Semaphore(0)

    class Busy:
        def __init__(self, gate: Gate) -> None:
            self.gate = gate

        def check_health(self) -> None:
            checks.release()

        def __call__(self) -> None:
            self.gate.wait_in_thread()

    gate = Gate()
    await stage.start(Busy, gate, max_ongoing_requests=5, health_check_period_s=0.01)
    futures = [stage.handle.call() for _ in range(5)]
    await wait_until(lambda: gate.inside == 1)
    while checks.acquire(blocking=False):
        pass

    await wait_until(lambda: checks.acquire(blocking=False))
    await wait_until(lambda: checks.acquire(blocking=False))

    gate.open()
    await asyncio.gather(*futures)
