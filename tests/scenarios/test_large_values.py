"""Large values between real processes: a hundred MB there and back, and processes that die with one on its way."""

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

import millstream
from millstream import serve
from millstream.errors import PayloadTooLargeError
from millstream.handles import engines
from tests.cluster_clients import open_blocking
from tests.scenarios.processes import wait_for
from tests.scenarios.streamers import Streamer, forget_peak, peak_bytes

np = pytest.importorskip("numpy")

pytestmark = pytest.mark.processes

MB = 1_000_000


def made(ledger: Path) -> list[tuple[str, int]]:
    return [(what, int(pid)) for what, pid in (line.split() for line in ledger.read_text().splitlines())]


def running_replicas() -> int:
    return serve.status().applications["default"].deployments["Streamer"].replica_states.get("RUNNING", 0)


def test_hundred_megabytes_there_and_back_take_little_more_memory_than_that() -> None:
    """The caller needs what comes; the replica what came, and a copy of its result, which others may change meanwhile."""
    handle = serve.run(Streamer.bind())
    echo = handle.options(method_name="echo")
    echo.call(np.ones(MB, np.uint8))
    array = np.full(100 * MB, 7, np.uint8)
    gc.collect()
    handle.forget_peak.call()
    forget_peak()
    before = peak_bytes(), handle.peak_bytes.call()

    again = echo.call(array)

    grown = peak_bytes() - before[0], handle.peak_bytes.call() - before[1]
    assert np.array_equal(again, array)
    assert again.flags.writeable
    assert grown[0] < 1.3 * array.nbytes
    assert grown[1] < 2.3 * array.nbytes


@pytest.mark.parametrize("after_s", [0.02, 0.1, 0.3])
def test_value_comes_though_its_replica_is_killed_while_it_writes_it(ledger: Path, after_s: float) -> None:
    handle = serve.run(Streamer.options(num_replicas=2).bind(str(ledger)))
    wait_for(lambda: running_replicas() == 2)
    ref = handle.options(method_name="make", block_until="queued").remote(100 * MB)
    wait_for(lambda: made(ledger))

    time.sleep(after_s)
    os.kill(made(ledger)[0][1], signal.SIGKILL)

    assert len(millstream.get(ref, timeout=30)) == 100 * MB


@pytest.mark.parametrize("after_s", [0.05, 0.2, 0.4])
def test_arguments_come_though_the_replica_is_killed_while_it_reads_them(ledger: Path, after_s: float) -> None:
    handle = serve.run(Streamer.options(num_replicas=2).bind(str(ledger)))
    wait_for(lambda: running_replicas() == 2)
    pids = {handle.pid.call() for _ in range(20)}
    ref = handle.options(method_name="echo", block_until="queued").remote(np.ones(100 * MB, np.uint8))

    time.sleep(after_s)
    os.kill(pids.pop(), signal.SIGKILL)

    assert millstream.get(ref, timeout=30).nbytes == 100 * MB


CALLER = """
import numpy as np
from millstream import serve

handle = serve.get_deployment_handle("Streamer", sync=True)
handle.pid.call()
print("sending", flush=True)
while True:
    handle.options(method_name="echo").call(np.ones(100_000_000, np.uint8))
"""


@pytest.mark.parametrize("after_s", [0.3, 0.7])
def test_caller_that_is_killed_leaves_nothing_for_ever(
    script: Callable[[str], "Popen[str]"], monkeypatch: pytest.MonkeyPatch, after_s: float
) -> None:
    serve.run(Streamer.bind())
    settings = engines.settings()
    for name, value in settings.to_environment().items():
        monkeypatch.setenv(name, value)
    caller = script(CALLER)
    assert caller.stdout is not None
    assert caller.stdout.readline().strip() == "sending"

    time.sleep(after_s)
    caller.kill()
    caller.wait()

    server = open_blocking(settings.url)
    wait_for(lambda: not server.hlen("{ms:default.Streamer}:open"), 20.0)
    left = [key for key in server.scan_iter("{ms:default.Streamer}:*") if key.split(b":")[2] in KINDS]
    ttls = {key: server.ttl(key) for key in left}
    server.close()
    assert all(0 < ttl <= 3600 for ttl in ttls.values()), ttls


KINDS = {b"payload", b"value", b"arriving", b"items", b"result"}


def test_limit_is_the_one_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_PAYLOAD_LIMIT", "5000000")  # for the replicas, which this process starts
    handle = serve.run(Streamer.bind())

    assert len(handle.options(method_name="make").call(4 * MB)) == 4 * MB
    with pytest.raises(PayloadTooLargeError, match=r"a result of default.Streamer takes 6,000,0\d\d bytes"):
        handle.options(method_name="make").call(6 * MB)
