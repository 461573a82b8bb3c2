"""Streams between real processes: a killed replica, a killed reader, and a hundred thousand items."""

# mypy: disable-error-code="attr-defined"
# (mypy does not apply what a class decorator returns: https://github.com/python/mypy/issues/3135)

import gc
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest

from millstream import serve
from millstream.handles import engines
from tests.cluster_clients import open_blocking
from tests.scenarios.processes import wait_for
from tests.scenarios.streamers import Streamer, forget_peak, peak_bytes

pytestmark = pytest.mark.processes

MB = 1_000_000


def made(ledger: Path) -> list[tuple[str, int]]:
    """(number or "closed", pid) of all that was made."""
    return [(what, int(pid)) for what, pid in (line.split() for line in ledger.read_text().splitlines())]


def running_replicas() -> int:
    return serve.status().applications["default"].deployments["Streamer"].replica_states.get("RUNNING", 0)


@pytest.mark.parametrize("method", ["count", "count_in_thread"])
def test_reader_sees_every_item_once_though_its_replica_is_killed(ledger: Path, method: str) -> None:
    handle = serve.run(Streamer.options(num_replicas=2).bind(str(ledger)))
    wait_for(lambda: running_replicas() == 2)
    stream = handle.options(method_name=method, max_ahead=20, max_attempts=10).stream(200, 0.002)
    items = []

    killed_at = {40, 90, 150}
    for item in stream:
        items.append(item)
        if len(items) in killed_at:
            os.kill(made(ledger)[-1][1], signal.SIGKILL)

    assert items == list(range(200))
    assert len({pid for _, pid in made(ledger)}) >= 3


def test_reader_sees_every_large_item_once_though_its_replica_is_killed(ledger: Path) -> None:
    handle = serve.run(Streamer.options(num_replicas=2).bind(str(ledger)))
    wait_for(lambda: running_replicas() == 2)
    stream = handle.options(method_name="blobs", max_ahead=3).stream(30, 2 * MB, 0.005)
    items = []

    for item in stream:
        items.append((item[0], len(item)))
        if len(items) == 10:
            os.kill(made(ledger)[-1][1], signal.SIGKILL)

    assert items == [(n, 2 * MB) for n in range(30)]


READER = """
from millstream import serve

stream = serve.get_deployment_handle("Streamer", sync=True).options(method_name="count", max_ahead=10).stream(1_000_000)
next(stream)
print("reading", flush=True)
input()
"""


def test_producer_gives_up_when_its_reader_was_killed(
    script: Callable[[str], "Popen[str]"], ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its slot is free for others."""
    handle = serve.run(Streamer.options(max_ongoing_requests=1).bind(str(ledger), 0.5))
    settings = engines.settings()
    for name, value in settings.to_environment().items():
        monkeypatch.setenv(name, value)
    reader = script(READER)
    assert reader.stdout is not None
    assert reader.stdout.readline().strip() == "reading"
    wait_for(lambda: len(made(ledger)) == 10)

    reader.kill()

    wait_for(lambda: made(ledger)[-1][0] == "closed", 10.0, "the end of the generator")
    assert len(made(ledger)) <= 12
    assert handle.options(method_name="echo").call("free") == "free"
    server = open_blocking(settings.url)
    wait_for(lambda: not list(server.scan_iter("*:items:*")))
    server.close()


@pytest.mark.single_server
def test_hundred_thousand_items_take_no_more_memory_than_a_few(ledger: Path) -> None:
    handle = serve.run(Streamer.bind())
    server = open_blocking(engines.settings().url)
    count = handle.options(method_name="count")
    assert sum(1 for _ in count.stream(5000)) == 5000
    gc.collect()
    handle.forget_peak.call()
    forget_peak()
    server.config_resetstat()
    before = peak_bytes(), handle.peak_bytes.call(), int(server.info("memory")["used_memory"])
    most_on_server = 0

    expected = 0
    started = time.monotonic()
    for item in count.stream(100_000):
        assert item == expected
        expected += 1
        if expected % 10_000 == 0:
            most_on_server = max(most_on_server, int(server.info("memory")["used_memory"]))
    took_s = time.monotonic() - started

    assert expected == 100_000
    print(f"{100_000 / took_s:.0f} items/s")
    grown = peak_bytes() - before[0], handle.peak_bytes.call() - before[1], most_on_server - before[2]
    server.close()
    assert all(growth < 5 * MB for growth in grown), grown
