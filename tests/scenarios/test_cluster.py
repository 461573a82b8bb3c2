"""Applications on a Redis Cluster of three primaries, one deployment with each; and one primary that is killed."""

# mypy: disable-error-code="attr-defined"
# (mypy does not apply what a class decorator returns: https://github.com/python/mypy/issues/3135)

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import millstream
from millstream import serve
from millstream.errors import MillstreamError, RefNotFoundError, RequestCancelledError
from millstream.handles.handle import DeploymentHandle, SyncHandle
from tests.cluster import Cluster, names_on_each
from tests.scenarios.apps import Worker
from tests.scenarios.processes import wait_for
from tests.scenarios.streamers import Streamer
from tests.servers import AnyServer

pytestmark = [pytest.mark.processes, pytest.mark.any_server]
SECRET = "a secret for tests"
NAMES = names_on_each()


@serve.deployment
class Front:
    """Calls the others, wherever they are."""

    def __init__(self, *parts: DeploymentHandle) -> None:
        self._parts = parts

    async def through(self, value: Any) -> list[Any]:
        """One call of each, the result of each the argument of the next, without waiting in between."""
        ref: Any = value
        for part in self._parts:
            ref = await part.echo.remote(ref)
        return [value, await ref]


@pytest.fixture(scope="module")
def cluster(server: AnyServer) -> Iterator[Cluster]:
    cluster = Cluster(server.name)
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture
def connected(cluster: Cluster) -> Iterator[Cluster]:
    cluster.flush()
    millstream.init(cluster.url, secret_key=SECRET)
    yield cluster
    serve.shutdown()
    millstream.shutdown()


def handle_of(name: str) -> SyncHandle:
    return serve.get_deployment_handle(name, sync=True)


def test_deployments_of_one_application_are_on_different_nodes(cluster: Cluster) -> None:
    assert len({cluster.primary_of(f"{{ms:default.{name}}}:open").port for name in NAMES}) == 3


def test_everything_works_across_slots(connected: Cluster, ledger: Path, tmp_path: Path) -> None:
    parts = [Streamer.options(name=name).bind(str(ledger)) for name in NAMES]
    front = serve.run(Front.bind(*parts))
    streamers, large = [handle_of(name) for name in NAMES], b"x" * 1_000_000

    for streamer in streamers:
        assert streamer.echo.call("here") == "here"
        assert list(streamer.echo.map(range(200))) == list(range(200))
        assert list(streamer.count.stream(20)) == list(range(20))
        assert streamer.echo.call(large) == large
    first, second, third = streamers
    assert third.echo.call(second.echo.remote(first.echo.remote("chained"))) == "chained"
    assert third.echo.call(second.echo.remote(first.echo.remote(large))) == large
    assert front.through.call("through") == ["through", "through"]
    assert front.through.call(large) == [large, large]
    assert [millstream.get(millstream.put(number)) for number in range(70)] == list(range(70))  # 64 slots
    assert second.echo.call(millstream.put(large)) == large
    assert third.echo.options(delay_s=0.05).call("later") == "later"
    with pytest.raises(TypeError, match="multiply"):  # and the error goes through three slots
        third.echo.call(second.echo.remote(first.make.remote("no number")))


def test_cancel_reaches_what_runs_and_what_waits_in_any_slot(connected: Cluster, ledger: Path, tmp_path: Path) -> None:
    serve.run(Front.bind(*[Worker.options(name=name).bind(str(ledger)) for name in NAMES]))
    until = str(tmp_path / "never")

    for name in NAMES:
        running = handle_of(name).hold.remote("a", until)
        parked = handle_of(NAMES[0]).options(block_until="queued").note.remote("b", running)
        assert running.cancel()
        for ref in (running, parked):
            with pytest.raises(RequestCancelledError):
                ref.result(timeout=20)


def test_deployments_at_zero_wake_up_and_scale(connected: Cluster) -> None:
    scaling = {"min_replicas": 0, "max_replicas": 2, "initial_replicas": 0}
    asleep = [Streamer.options(name=name, autoscaling_config=scaling).bind() for name in NAMES]
    serve.run(Front.bind(*asleep))

    assert [handle_of(name).echo.call(name) for name in NAMES] == NAMES

    serve.run(Front.bind(*[Streamer.options(name=name, num_replicas=2).bind() for name in NAMES]))
    deployments = serve.status().applications["default"].deployments
    wait_for(lambda: all(deployments[name].replica_states.get("RUNNING") for name in NAMES))
    assert serve.status().applications["default"].status == "RUNNING"


class Load:
    """Callers in threads of their own, each with one call after the other, until told to stop."""

    def __init__(self, call: Callable[[int], Any], threads: int = 4) -> None:
        self._call, self._stop = call, threading.Event()
        self.returned = self.not_found = 0
        self.wrong: list[BaseException] = []
        self._pool = ThreadPoolExecutor(threads)
        self._futures = [self._pool.submit(self._run, number * 1_000_000) for number in range(threads)]

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            number += 1
            try:
                assert self._call(number) == number
                self.returned += 1
            except RefNotFoundError:
                self.not_found += 1  # the primary had acknowledged it, and no replica had it yet
            except (MillstreamError, AssertionError, TimeoutError) as e:
                self.wrong.append(e)

    def stop(self) -> None:
        self._stop.set()
        for future in self._futures:
            future.result(60)
        self._pool.shutdown()


@pytest.mark.parametrize(("how", "number"), [("freeze", 0), ("kill", 1)])  # what is killed stays away
def test_failover_loses_nothing_that_was_replicated_and_hangs_nobody(
    connected: Cluster, ledger: Path, tmp_path: Path, how: str, number: int
) -> None:
    victim, *others = NAMES[number:] + NAMES[:number]
    serve.run(Front.bind(*[Worker.options(name=name, max_ongoing_requests=500).bind(str(ledger)) for name in NAMES]))
    go = tmp_path / "go"
    queued = handle_of(victim).options(block_until="queued")
    held = [queued.hold.remote(f"held-{number}", str(go)) for number in range(150)]
    parked = [handle_of(others[0]).options(block_until="queued").echo.remote(ref) for ref in held[:20]]
    load = Load(lambda number: handle_of(others[number % 2]).options(timeout_s=60).echo.call(number))
    on_victim = Load(
        lambda number: handle_of(others[1]).options(timeout_s=60).echo.call(queued.note.remote("x", number))[0]
    )
    wait_for(lambda: len(ledger.read_text().splitlines()) > 100)
    connected.wait_for_replicas()
    primary = connected.primary_of(f"{{ms:default.{victim}}}:open")

    connected.fail(primary, how)
    failed_at, before = time.monotonic(), on_victim.returned
    wait_for(lambda: on_victim.returned > before + 20, 60, "calls to go on")
    outage_s = time.monotonic() - failed_at
    go.touch()

    values = millstream.get(held, timeout=60)
    assert [name for name, _ in values] == [f"held-{number}" for number in range(150)]
    assert [value[0] for value in millstream.get(parked, timeout=60)] == [f"held-{number}" for number in range(20)]
    load.stop()
    on_victim.stop()
    assert load.wrong == on_victim.wrong == []
    assert load.returned > 0
    assert connected.primary_of(f"{{ms:default.{victim}}}:open") is not primary
    if how == "freeze":
        connected.thaw(primary)
    print(f"calls go on after {outage_s:.1f} s; not found: {load.not_found} + {on_victim.not_found}")
