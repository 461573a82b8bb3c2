"""Whole process trees: each test has its own, and nothing of it may be left afterwards.

They bring their server along, or use a cluster (`--servers cluster`, or the mark `on_cluster`).
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import millstream
from millstream import runtime, serve
from tests.leaks import find_leaks, find_lost, take_snapshot
from tests.scenarios.processes import descendants, wait_for_end
from tests.servers import BY_DEFAULT, CLUSTER, chosen_servers
from tests.shared_servers import SharedServers

EMBEDDED = "embedded"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "server" in metafunc.fixturenames:
        return
    chosen = chosen_servers(metafunc.config)
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    is_on_cluster = CLUSTER in chosen or ("on_cluster" in marks and chosen == list(BY_DEFAULT))
    places = [EMBEDDED] if chosen != [CLUSTER] else []
    if is_on_cluster and "single_server" not in marks:
        places.append(CLUSTER)
    if places != [EMBEDDED]:
        metafunc.parametrize("cluster_url", places, indirect=True)


@pytest.fixture
def cluster_url(request: pytest.FixtureRequest, servers: SharedServers) -> Iterator[str]:
    """Of a flushed cluster, on which nothing may be left behind; "" where the embedded server serves."""
    if getattr(request, "param", EMBEDDED) == EMBEDDED:
        yield ""
        return
    server = servers.get(CLUSTER)
    with server.connect_blocking() as client:
        client.flushall()
        yield server.url
        snapshot = take_snapshot(client)
    assert find_leaks(snapshot) == []
    assert find_lost(snapshot) == []


@pytest.fixture(autouse=True)
def own_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster_url: str) -> Iterator[None]:
    """A directory without a server in it; at the end everything that was started is gone."""
    monkeypatch.chdir(tmp_path)
    for name in ("MILLSTREAM_URL", "MILLSTREAM_SECRET_KEY", "MILLSTREAM_NAMESPACE", "MILLSTREAM_LEASE_S"):
        monkeypatch.delenv(name, raising=False)
    if cluster_url:
        monkeypatch.setenv("MILLSTREAM_URL", cluster_url)
        monkeypatch.setenv("MILLSTREAM_SECRET_KEY", "a secret for tests")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    before = descendants(os.getpid())
    yield
    started = descendants(os.getpid()) - before
    if runtime.is_initialized():
        serve.shutdown()
    millstream.shutdown()
    left = wait_for_end(started, timeout_s=15.0)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"processes left behind: {left}"


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "ledger"
    path.touch()
    return path


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[[str], "subprocess.Popen[str]"]]:
    """Start a Python script as a process of its own."""
    running: list[subprocess.Popen[str]] = []

    def start(source: str) -> "subprocess.Popen[str]":
        path = tmp_path / "script.py"
        path.write_text(source)
        process = subprocess.Popen(
            [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
