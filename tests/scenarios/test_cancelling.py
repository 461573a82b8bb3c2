"""Cancelling and deadlines among real processes: replicas that are stuck, frozen or killed, and callers of callers."""

# mypy: disable-error-code="attr-defined"
# (mypy does not apply what a class decorator returns: https://github.com/python/mypy/issues/3135)

import os
import signal
import time
from pathlib import Path

import pytest

import millstream
from millstream import serve
from millstream.broker.registry import Registry
from millstream.errors import RequestCancelledError, RequestTimeoutError
from millstream.handles.ref import ObjectRef
from millstream.runtime import with_registry
from tests.scenarios.processes import wait_for, wait_for_end
from tests.scenarios.stoppable import Caller, Stoppable
from tests.timing import timed

pytestmark = pytest.mark.processes


def lines(ledger: Path, what: str) -> list[tuple[str, int]]:
    """(request, pid) of what was noted so."""
    rows = [line.split() for line in ledger.read_text().splitlines()]
    return [(name, int(pid)) for word, name, pid in rows if word == what]


def send(method: str, name: str, go: Path, deployment: str = "Stoppable", **options: object) -> ObjectRef:
    handle = serve.get_deployment_handle(deployment, sync=True)
    return handle.options(method_name=method, block_until="queued", **options).remote(name, str(go))


def dead_letters() -> int:
    async def count(registry: Registry) -> int:
        return await registry.dead_count("default.Stoppable")

    return with_registry(count)


def test_stuck_threads_process_is_replaced_at_once_and_nothing_else_of_it_is_lost(tmp_path: Path, ledger: Path) -> None:
    handle = serve.run(Stoppable.options(max_ongoing_requests=10).bind(str(ledger)))
    stuck_pid = handle.pid.call()

    for round_ in range(3):
        go, stuck = tmp_path / f"go-{round_}", f"stuck-{round_}"
        ref = send("block", stuck, tmp_path / "never", kill_on_cancel=True)
        wait_for(lambda stuck=stuck: stuck in dict(lines(ledger, "started")))  # type: ignore[misc]
        beside = [send("hold", f"beside-{round_}-{x}", go) for x in range(3)]
        wait_for(lambda round_=round_: f"beside-{round_}-2" in dict(lines(ledger, "started")))  # type: ignore[misc]
        behind = [send("block", f"behind-{round_}-{x}", go) for x in range(3)]  # they wait for the stuck thread
        time.sleep(0.1)

        assert ref.cancel()
        wait_for(lambda pid=stuck_pid: handle.pid.call() != pid, what="another process")  # type: ignore[misc]
        go.touch()

        assert {pid for _, pid in millstream.get(beside, timeout=5)} == {stuck_pid}, "they end where they run"
        new_pid = handle.pid.call()
        assert {pid for _, pid in millstream.get(behind, timeout=5)} == {new_pid}
        assert wait_for_end([stuck_pid], 5.0) == set()
        stuck_pid = new_pid

    started = [name for name, _ in lines(ledger, "started")]
    assert len(started) == len(set(started)) == 3 * 7, "each of them ran once"
    assert dead_letters() == 0


def test_stuck_thread_whose_time_is_up_is_replaced_too(tmp_path: Path, ledger: Path) -> None:
    handle = serve.run(Stoppable.options(max_ongoing_requests=10).bind(str(ledger)))
    pid = handle.pid.call()

    ref = send("block", "stuck", tmp_path / "never", kill_on_cancel=True, timeout_s=0.5)

    with pytest.raises(RequestTimeoutError):
        ref.result(2)
    assert wait_for_end([pid], 5.0) == set()
    assert handle.pid.call() != pid


def test_request_on_a_frozen_replica_is_cancelled_at_once_and_its_late_value_ignored(
    tmp_path: Path, ledger: Path
) -> None:
    serve.run(Stoppable.bind(str(ledger)))
    ref = send("hold", "it", tmp_path / "go")
    wait_for(lambda: lines(ledger, "started"))
    ((_, pid),) = lines(ledger, "started")

    os.kill(pid, signal.SIGSTOP)
    try:
        assert ref.cancel()
        with pytest.raises(RequestCancelledError):
            ref.result(1)
    finally:
        (tmp_path / "go").touch()
        os.kill(pid, signal.SIGCONT)

    handle = serve.get_deployment_handle("Stoppable", sync=True)
    assert handle.pid.call() == pid
    assert ref.status() == "cancelled"


@pytest.mark.parametrize("when", ["at once", "when it runs again"])
def test_request_of_a_killed_replica_is_cancelled_for_good(tmp_path: Path, ledger: Path, when: str) -> None:
    serve.run(Stoppable.options(num_replicas=2).bind(str(ledger)))
    handle = serve.get_deployment_handle("Stoppable", sync=True)
    wait_for(lambda: len({handle.pid.call() for _ in range(10)}) == 2)
    ref = send("hold", "it", tmp_path / "never")
    wait_for(lambda: lines(ledger, "started"))

    os.kill(lines(ledger, "started")[0][1], signal.SIGKILL)
    if when == "when it runs again":
        wait_for(lambda: len(lines(ledger, "started")) == 2)
    assert ref.cancel()
    with pytest.raises(RequestCancelledError):
        ref.result(1)

    starts = len(lines(ledger, "started"))
    wait_for(lambda: len(lines(ledger, "cancelled")) == starts - 1, what="whatever runs is told")
    assert handle.pid.call()
    assert len(lines(ledger, "started")) <= 2
    assert dead_letters() == 0


@pytest.mark.parametrize("method", ["on_the_loop", "in_a_thread"])
@pytest.mark.parametrize("end", ["cancel", "deadline"])
def test_what_a_request_has_sent_to_other_processes_ends_with_it(
    tmp_path: Path, ledger: Path, method: str, end: str
) -> None:
    serve.run(Caller.bind(Stoppable.bind(str(ledger))))
    timeout_s = None if end == "cancel" else 2.0

    ref = send(method, "it", tmp_path / "never", "Caller", timeout_s=timeout_s)
    wait_for(lambda: lines(ledger, "started"))
    if end == "cancel":
        assert ref.cancel()

    with pytest.raises(RequestCancelledError if end == "cancel" else RequestTimeoutError):
        ref.result(5)
    wait_for(lambda: len(lines(ledger, "cancelled")) == 1)


@timed
def test_deadlines_hold_while_the_only_replica_is_blocked(tmp_path: Path, ledger: Path) -> None:
    serve.run(Stoppable.bind(str(ledger)))
    blocking = send("block_the_loop", "blocks", tmp_path / "go", timeout_s=1.0)
    wait_for(lambda: lines(ledger, "started"))
    waiting = send("hold", "waits", tmp_path / "go", timeout_s=1.0)
    started = time.monotonic()

    for ref in (blocking, waiting):
        with pytest.raises(RequestTimeoutError):
            ref.result(5)
    assert time.monotonic() - started < 1.5
    (tmp_path / "go").touch()

    assert send("hold", "after", tmp_path / "go").result(5)[0] == "after"
    assert [name for name, _ in lines(ledger, "started")] == ["blocks", "after"]


def test_request_of_a_blocked_loop_is_cancelled_for_its_caller(tmp_path: Path, ledger: Path) -> None:
    serve.run(Stoppable.bind(str(ledger)))
    ref = send("block_the_loop", "it", tmp_path / "go")
    wait_for(lambda: lines(ledger, "started"))

    assert ref.cancel()
    with pytest.raises(RequestCancelledError):
        ref.result(1)
    (tmp_path / "go").touch()

    assert send("hold", "after", tmp_path / "go").result(5)[0] == "after"
    assert ref.status() == "cancelled"
