"""Hosts that vanish and come back, and a server that stands still: only by leases can they be told apart."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import millstream
from millstream import serve
from millstream.broker.registry import Registry
from millstream.handles import engines
from millstream.handles.ref import ObjectRef
from millstream.runtime import with_registry
from tests.scenarios.apps import Worker
from tests.scenarios.processes import command_line, descendants, find, me, wait_for
from tests.timing import timed

pytestmark = pytest.mark.processes

LEASE_S = 1.0
SECOND = "second"


@pytest.fixture(autouse=True)
def short_lease(own_tree: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_LEASE_S", f"{LEASE_S:g}")


@pytest.fixture
def second_host(short_lease: None) -> Iterator[int]:
    """The launcher of a second node; it and its replicas stand for another host."""
    serve.start()
    environment = {**os.environ, **engines.settings().to_environment()}
    command = [sys.executable, "-m", "millstream", "launcher", "--node", SECOND]
    launcher = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    wait_for(lambda: len(with_registry(Registry.nodes)) == 2, what="a second node")
    yield launcher.pid
    tell(launcher.pid, signal.SIGCONT)
    launcher.terminate()
    launcher.wait(30)


def tell(launcher: int, number: signal.Signals) -> None:
    """Signal a launcher and all that it has started."""
    for pid in (launcher, *descendants(launcher)):
        os.kill(pid, number)


def send(name: str, go: Path) -> ObjectRef:
    handle = serve.get_deployment_handle("Worker", sync=True)
    return handle.options(method_name="hold", block_until="queued").remote(name, str(go))


def starts(ledger: Path) -> list[list[str]]:
    """[request, pid] of every attempt that was started."""
    return [line.split() for line in ledger.read_text().splitlines()]


def running_replicas() -> int:
    return serve.status().applications["default"].deployments["Worker"].replica_states.get("RUNNING", 0)


@timed
def test_requests_of_a_vanished_host_run_elsewhere_within_the_lease(
    second_host: int, tmp_path: Path, ledger: Path
) -> None:
    serve.run(Worker.options(num_replicas=2, max_ongoing_requests=2).bind(str(ledger)))
    wait_for(lambda: running_replicas() == 2)
    refs = [send(name, tmp_path / "go") for name in "ab"]
    wait_for(lambda: len(starts(ledger)) == 2)
    there = {str(pid) for pid in descendants(second_host)}
    lost = [name for name, pid in starts(ledger) if pid in there]
    assert len(lost) == 1

    tell(second_host, signal.SIGSTOP)  # its connections stay open, as those of a host without power do
    vanished_at = time.monotonic()
    wait_for(lambda: len(starts(ledger)) == 3, what="another attempt")
    takeover_s = time.monotonic() - vanished_at
    (tmp_path / "go").touch()
    pids = {str(millstream.get(ref, timeout=10)[1]) for ref in refs}
    tell(second_host, signal.SIGCONT)

    assert pids.isdisjoint(there)
    assert [name for name, _ in starts(ledger)[2:]] == lost
    wait_for(lambda: running_replicas() == 2, what="the host to be back")
    assert takeover_s < LEASE_S + 0.5  # some ms to start it, and what other processes take of this machine


def test_host_that_comes_back_finishes_nothing_that_was_taken_from_it(
    second_host: int, tmp_path: Path, ledger: Path
) -> None:
    serve.run(Worker.options(num_replicas=2, max_ongoing_requests=2).bind(str(ledger)))
    wait_for(lambda: running_replicas() == 2)
    refs = [send(name, tmp_path / "go") for name in "ab"]
    wait_for(lambda: len(starts(ledger)) == 2)
    there = {str(pid) for pid in descendants(second_host)}

    tell(second_host, signal.SIGSTOP)
    wait_for(lambda: len(starts(ledger)) == 3, what="another attempt")
    tell(second_host, signal.SIGCONT)  # both attempts go on, and end when they are told
    wait_for(lambda: running_replicas() == 2, what="the host to be back")
    (tmp_path / "go").touch()

    assert there.isdisjoint(str(millstream.get(ref, timeout=10)[1]) for ref in refs)
    handle = serve.get_deployment_handle("Worker", sync=True)
    wait_for(lambda: str(handle.pid.call()) in there, what="it to work again")
    assert len(starts(ledger)) == 3


@pytest.mark.single_server
def test_server_that_stands_still_for_longer_than_the_lease_is_nobodys_death(
    second_host: int, tmp_path: Path, ledger: Path
) -> None:
    serve.run(Worker.options(num_replicas=4, max_ongoing_requests=2).bind(str(ledger)))
    wait_for(lambda: running_replicas() == 4)
    refs = [send(str(n), tmp_path / "go") for n in range(8)]
    wait_for(lambda: len(starts(ledger)) == 8)
    port = engines.settings().url.rpartition(":")[2].partition("/")[0]
    (server,) = [pid for pid in find(me(), "valkey-server") if f":{port}" in command_line(pid)]

    for _ in range(2):
        os.kill(server, signal.SIGSTOP)
        time.sleep(3 * LEASE_S)  # all leases expire meanwhile
        os.kill(server, signal.SIGCONT)
        wait_for(lambda: running_replicas() == 4, what="all to be there")
    (tmp_path / "go").touch()

    done = [millstream.get(ref, timeout=30) for ref in refs]
    assert [name for name, _ in done] == [str(n) for n in range(8)]
    assert sorted(name for name, _ in starts(ledger)) == [str(n) for n in range(8)]
