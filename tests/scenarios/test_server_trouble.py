"""A server that stalls, starts anew, turns read-only, is full of connections or empty: nobody mistakes that for deaths,
and everybody goes on by himself."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import millstream
from millstream import serve
from millstream.errors import BrokerUnavailableError, RefNotFoundError
from millstream.handles.ref import ObjectRef
from tests.scenarios.apps import Worker
from tests.scenarios.processes import find, me, wait_for
from tests.servers import Server

pytestmark = [pytest.mark.processes, pytest.mark.single_server]

LONGER_THAN_A_LEASE_S = 6.0


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
    handle = serve.run(Worker.options(num_replicas=3, health_check_timeout_s=4.0).bind(str(ledger)))
    wait_for(lambda: len(pids()) == 3)
    before, names = pids(), [f"r{number}" for number in range(12)]
    refs = [send(name, "hold", tmp_path / "go") for name in names]
    wait_for(lambda: len(starts(ledger)) == 12)

    for stall in (freeze, pause_writes):
        stall(there)
        assert handle.options(timeout_s=30).echo.call(stall.__name__) == stall.__name__
        time.sleep(1.5)  # for whoever would bury or kill
    (tmp_path / "go").touch()

    assert [value[0] for value in millstream.get(refs, timeout=30)] == names
    assert starts(ledger) == Counter(names)
    assert pids() == before


def test_everybody_goes_on_through_all_that_befalls_a_living_server(there: Server, ledger: Path) -> None:
    """Under load, one after the other: SCRIPT FLUSH, CLIENT KILL of everybody, CLIENT PAUSE, a demotion, a crash."""
    serve.run(Worker.options(num_replicas=2).bind(str(ledger)))
    wait_for(lambda: len(pids()) == 2)
    before, components = pids(), launcher_and_autoscaler()
    handle = serve.get_deployment_handle("Worker", sync=True)
    names = [f"n{number}" for number in range(2500)]
    done: list[Any] = []

    def load() -> None:
        done.extend(handle.note.map(names, max_in_flight=20))

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load)
        for trouble in (forget_scripts, kill_clients, pause, demote, crash):
            enough = len(done) + 50
            wait_for(partial(is_at, done, enough), what=f"some results before {trouble.__name__}")
            assert not loading.done(), "more load is needed"
            trouble(there)
        loading.result(60)

    assert done == [()] * len(names)
    assert starts(ledger) == Counter(names)
    assert pids() == before
    assert launcher_and_autoscaler() == components


def is_at(done: list[Any], count: int) -> bool:
    return len(done) >= count


def launcher_and_autoscaler() -> list[int]:
    return find(me(), "millstream: launcher") + find(me(), "millstream: autoscaler")


def freeze(server: Server) -> None:
    server.freeze()
    time.sleep(LONGER_THAN_A_LEASE_S)
    server.thaw()


def pause_writes(server: Server) -> None:
    """As before a failover: whoever only reads sees no trouble."""
    with server.connect_blocking() as client:
        client.client_pause(int(LONGER_THAN_A_LEASE_S * 1000), all=False)
    time.sleep(LONGER_THAN_A_LEASE_S)


def forget_scripts(server: Server) -> None:
    with server.connect_blocking() as client:
        client.script_flush()


def kill_clients(server: Server) -> None:
    with server.connect_blocking() as client:
        client.client_kill_filter(_type="normal", skipme=True)
        client.client_kill_filter(_type="pubsub")


def pause(server: Server) -> None:
    with server.connect_blocking() as client:
        client.client_pause(500, all=True)


def demote(server: Server) -> None:
    """As after a failover that nobody told its clients of: it answers READONLY, until it is promoted again."""
    with server.connect_blocking() as client:
        client.replicaof("127.0.0.1", "1")
        time.sleep(0.5)
        client.replicaof("NO", "ONE")


def crash(server: Server) -> None:
    server.kill()
    time.sleep(0.5)
    server.start()


def test_server_that_takes_no_more_connections_is_named_and_those_that_are_there_go_on(there: Server) -> None:
    handle = serve.run(Worker.bind())
    assert handle.echo.call(1) == 1
    with there.connect_blocking() as client:
        client.config_set("maxclients", len(client.client_list()))
        try:
            with pytest.raises(BrokerUnavailableError, match="max number of clients"):
                asyncio.run(call_from_a_new_loop())
            assert [handle.echo.call(number) for number in range(20)] == list(range(20))
            kill_clients_of(client, "ms:client:")  # they find their places taken, or take them again
        finally:
            client.config_set("maxclients", 1000)

    assert handle.echo.call(2) == 2
    assert asyncio.run(call_from_a_new_loop()) == "new"
    assert len(pids()) == 1


async def call_from_a_new_loop() -> Any:
    return await serve.get_deployment_handle("Worker").echo.call("new")


def kill_clients_of(client: Any, prefix: str) -> None:
    for row in client.client_list():
        if row["name"].startswith(prefix):
            client.client_kill_filter(_id=row["id"])


def test_server_that_is_emptied_ends_what_was_on_it_and_serves_what_is_deployed_again(
    there: Server, tmp_path: Path, ledger: Path
) -> None:
    serve.run(Worker.bind(str(ledger)))
    refs = [send(name, "hold", tmp_path / "go") for name in ("a", "b")]
    wait_for(lambda: len(starts(ledger)) == 2)

    with there.connect_blocking() as client:
        client.flushall()

    for ref in refs:
        with pytest.raises(RefNotFoundError):
            ref.result(timeout=30)
    (tmp_path / "go").touch()  # what ran there may end
    handle = serve.run(Worker.bind(str(ledger)))
    assert handle.echo.call("anew") == "anew"
    assert len(pids()) == 1
