"""A server that stalls, starts anew, turns read-only, is full of connections or empty: nobody mistakes that for deaths,
and everybody goes on by himself."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import millstream
from millstream import serve
from millstream.handles.ref import ObjectRef
from tests.scenarios.apps import Worker
from tests.scenarios.processes import wait_for
from tests.servers import Server

pytestmark = pytest.mark.processes

LONGER_THAN_A_LEASE_S = 7.0


@pytest.fixture
def there(own_tree: None) -> Iterator[Server]:
    """What it has acknowledged it has on disk. This process and all it starts use it."""
    server = Server("valkey", "--appendonly", "yes", "--appendfsync", "always").start()
    millstream.init(server.url, secret_key="a secret")
    yield server
    serve.shutdown()
    millstream.shutdown()
    server.stop()


def pids() -> set[int]:
    rows = serve.status().applications["default"].deployments["Worker"].replicas
    return {row.pid for row in rows if row.state == "RUNNING"}


def send(name: str, method: str, go: Path) -> ObjectRef:
    handle = serve.get_deployment_handle("Worker", sync=True)
    return handle.options(method_name=method, block_until="queued").remote(name, str(go))


def starts(ledger: Path) -> Counter[str]:
    return Counter(line.split()[0] for line in ledger.read_text().splitlines())


def test_server_that_stalls_for_longer_than_leases_and_health_checks_costs_no_replica(
    there: Server, tmp_path: Path, ledger: Path
) -> None:
    serve.run(Worker.options(num_replicas=3, health_check_timeout_s=4.0).bind(str(ledger)))
    wait_for(lambda: len(pids()) == 3)
    before, names = pids(), [f"r{number}" for number in range(12)]
    refs = [send(name, "hold", tmp_path / "go") for name in names]
    wait_for(lambda: len(starts(ledger)) == 12)

    there.freeze()
    time.sleep(LONGER_THAN_A_LEASE_S)
    there.thaw()
    during = serve.get_deployment_handle("Worker", sync=True).echo.remote("after")
    assert millstream.get(during, timeout=30) == "after"
    time.sleep(3.0)  # for whoever would bury or kill
    (tmp_path / "go").touch()

    assert [value[0] for value in millstream.get(refs, timeout=30)] == names
    assert starts(ledger) == Counter(names)
    assert pids() == before
