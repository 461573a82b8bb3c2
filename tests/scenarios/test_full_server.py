"""A server at its maxmemory, and real processes: what is new is refused with an error that says why, and all that was
there comes to its end, without anything restarted."""

# mypy: disable-error-code="attr-defined"
# (mypy does not apply what a class decorator returns: https://github.com/python/mypy/issues/3135)

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import millstream
from millstream import serve
from millstream.errors import BackPressureError, RequestCancelledError
from millstream.handles import engines
from millstream.handles.handle import SyncHandle
from millstream.handles.ref import ObjectRef
from tests.scenarios.apps import Worker
from tests.scenarios.processes import find, me, wait_for
from tests.servers import Server
from tests.timing import timed

pytestmark = pytest.mark.processes

LEASE_S = 1.0
MOST_REFUSING_S = 20.0  # ten calls: nobody waits for room, as who is not answered does for 30 s
LARGE_BYTES = 200_000  # beyond what fits into a result key
REFUSED = "out of memory and takes no more requests.*raise its maxmemory"


@pytest.fixture
def short_lease(own_tree: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_LEASE_S", f"{LEASE_S:g}")


@pytest.fixture
def there(own_tree: None, start_server: Callable[..., Server]) -> Iterator[Server]:
    """This process and all it starts use it."""
    server = start_server()
    millstream.init(server.url, secret_key="a secret")
    yield server
    serve.shutdown()
    millstream.shutdown()


def limit(server: Server, maxmemory: int) -> None:
    """1: it is full, whatever is deleted. 0: it is not."""
    with server.connect_blocking() as client:
        client.config_set("maxmemory", maxmemory)


def pids() -> set[int]:
    rows = serve.status().applications["default"].deployments["Worker"].replicas
    return {row.pid for row in rows if row.state == "RUNNING"}


def send(method: str, *arguments: object) -> ObjectRef:
    handle = serve.get_deployment_handle("Worker", sync=True)
    return handle.options(method_name=method, block_until="queued").remote(*arguments)


def starts(ledger: Path) -> Counter[str]:
    return Counter(line.split()[0] for line in ledger.read_text().splitlines())


def launcher_and_autoscaler() -> list[int]:
    return find(me(), "millstream: launcher") + find(me(), "millstream: autoscaler")


def say(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **engines.settings().to_environment()}
    command = [sys.executable, "-m", "millstream", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


async def call_from_a_new_loop() -> object:
    return await serve.get_deployment_handle("Worker").echo.call("new")


def refuses(handle: SyncHandle[Worker], open_: ObjectRef) -> None:
    """Callers of each kind are told at once."""
    calls: list[Callable[[], object]] = [
        lambda: handle.echo.call(1),
        lambda: handle.echo.call(b"x" * LARGE_BYTES),
        lambda: handle.echo.call(open_),  # it would wait for that
        lambda: handle.echo.options(delay_s=60).call(1),
        lambda: handle.echo.options(when_full="wait").call(1),
        lambda: send("echo", 1),
        lambda: list(handle.echo.map(range(5))),
        lambda: list(handle.count.stream("stream", "go", 1)),
        lambda: asyncio.run(call_from_a_new_loop()),
        lambda: millstream.put("a value"),
    ]
    began = time.monotonic()
    for call in calls:
        with pytest.raises(BackPressureError, match=REFUSED):
            call()
    assert time.monotonic() - began < MOST_REFUSING_S


@timed
def test_what_a_full_server_has_comes_to_its_end_and_what_is_new_is_refused(
    short_lease: None, there: Server, tmp_path: Path, ledger: Path
) -> None:
    go = str(tmp_path / "go")
    handle = serve.run(Worker.options(num_replicas=2, max_ongoing_requests=4).bind(str(ledger)))
    wait_for(lambda: len(pids()) == 2)
    before, components = pids(), launcher_and_autoscaler()
    refs = {name: send("hold", name, go) for name in "abcdef"}
    stream = handle.options(method_name="count").stream("stream", go, 10, 20, 30)
    dropped = send("hold", "dropped", go)
    wait_for(lambda: len(starts(ledger)) == 8)  # both replicas are busy
    queued = [send("note", f"q{number}", number) for number in range(5)]
    chained, unwanted = send("note", "chained", refs["a"]), send("note", "unwanted")

    limit(there, 1)
    refuses(handle, refs["a"])
    millstream.cancel(dropped)
    millstream.cancel(unwanted)
    time.sleep(3 * LEASE_S)  # for whoever would take something over
    assert (pids(), launcher_and_autoscaler()) == (before, components)
    (tmp_path / "go").touch()

    assert [value[0] for value in millstream.get([*refs.values()], timeout=30)] == list("abcdef")
    assert millstream.get(queued, timeout=30) == [(number,) for number in range(5)]
    assert chained.result(timeout=30)[0][0] == "a"
    assert [len(item) for item in stream] == [10, 20, 30]
    for ref in (dropped, unwanted):
        with pytest.raises(RequestCancelledError):
            ref.result(timeout=30)
    names = [*"abcdef", "stream", "dropped", "chained", *(f"q{number}" for number in range(5))]
    assert starts(ledger) == Counter(names)

    limit(there, 0)
    assert handle.echo.call(2) == 2
    assert asyncio.run(call_from_a_new_loop()) == "new"
    assert (pids(), launcher_and_autoscaler()) == (before, components)


@pytest.mark.any_server
def test_requests_of_a_replica_that_is_killed_beside_a_full_server_run_elsewhere(
    there: Server, tmp_path: Path, ledger: Path
) -> None:
    go = str(tmp_path / "go")
    handle = serve.run(Worker.options(num_replicas=2, max_ongoing_requests=4).bind(str(ledger)))
    wait_for(lambda: len(pids()) == 2)
    refs = [send("hold", f"r{number}", go) for number in range(8)]
    wait_for(lambda: len(starts(ledger)) == 8)

    limit(there, 1)
    killed = min(pids())
    held = [line.split()[0] for line in ledger.read_text().splitlines() if line.endswith(f" {killed}")]
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: len(starts(ledger)) == 8 and sum(starts(ledger).values()) == 8 + len(held))
    wait_for(lambda: len(pids() - {killed}) == 2, what="another replica in its place")
    (tmp_path / "go").touch()

    assert [value[0] for value in millstream.get(refs, timeout=30)] == [f"r{number}" for number in range(8)]
    assert starts(ledger) == Counter([*(f"r{number}" for number in range(8)), *held])
    limit(there, 0)
    assert handle.echo.call(2) == 2


@pytest.mark.any_server
def test_large_values_that_a_full_server_cannot_take_are_errors(there: Server, tmp_path: Path, ledger: Path) -> None:
    go = str(tmp_path / "go")
    handle = serve.run(Worker.bind(str(ledger)))
    result = send("grow", "result", go, LARGE_BYTES)
    reader = send("note", "reader", result)
    stream = handle.options(method_name="count").stream("stream", go, 10, LARGE_BYTES)
    wait_for(lambda: len(starts(ledger)) == 2)

    limit(there, 1)
    (tmp_path / "go").touch()

    for ref in (result, reader):
        with pytest.raises(BackPressureError, match="raise its maxmemory"):
            ref.result(timeout=30)
    items: list[bytes] = []
    with pytest.raises(BackPressureError, match="raise its maxmemory"):
        items.extend(stream)
    assert items == [b"x" * 10]
    assert starts(ledger) == Counter(["result", "stream"])
    limit(there, 0)
    assert len(send("grow", "again", go, LARGE_BYTES).result(timeout=30)) == LARGE_BYTES


@pytest.mark.any_server
def test_whoever_looks_at_a_full_server_or_scales_or_ends_what_is_there_is_answered(
    there: Server, ledger: Path
) -> None:
    serve.run(Worker.bind(str(ledger)))
    limit(there, 1)

    status, doctor = say("status"), say("doctor")
    scaled = say("scale", "Worker", "--replicas", "2")
    wait_for(lambda: len(pids()) == 2)
    serve.shutdown()

    assert status.returncode == 0 and "default.Worker" in status.stdout, status
    assert "new requests are refused; raise maxmemory" in doctor.stdout, doctor
    assert scaled.returncode == 0, scaled
