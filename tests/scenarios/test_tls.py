"""Applications on servers that are reached by TLS: their processes, large values and streams included."""

# mypy: disable-error-code="attr-defined"
# (mypy does not apply what a class decorator returns: https://github.com/python/mypy/issues/3135)

from pathlib import Path

import pytest
import redis

import millstream
from millstream import serve
from tests.cluster import Cluster, names_on_each
from tests.scenarios.streamers import Streamer
from tests.scenarios.test_cluster import Front
from tests.tls import start_tls_cluster, start_tls_server

pytestmark = [pytest.mark.processes, pytest.mark.single_server]


def test_everything_works_over_tls_and_nothing_goes_without(tmp_path: Path, ledger: Path) -> None:
    tls = start_tls_server(tmp_path)
    try:
        millstream.init(tls.url(), secret_key="a secret for tests")
        handle = serve.run(Streamer.bind(str(ledger)))
        large = b"x" * 3_000_000

        called = handle.echo.call("here")
        mapped = list(handle.echo.map(range(200)))
        streamed = list(handle.count.stream(20))
        echoed = handle.echo.call(large)
        chained = handle.echo.call(handle.echo.remote("there"))
        with redis.Redis.from_url(tls.server.url) as client:
            ours = [row for row in client.client_list() if row["name"].startswith("ms:")]
        serve.shutdown()
    finally:
        tls.server.stop()

    assert (called, mapped, streamed, chained) == ("here", list(range(200)), list(range(20)), "there")
    assert echoed == large
    assert ours and {row["laddr"] for row in ours} == {f"127.0.0.1:{tls.port}"}


def test_deployments_all_over_a_cluster_are_reached_over_tls(tmp_path: Path, ledger: Path) -> None:
    cluster, url = start_tls_cluster(tmp_path)
    names, large = names_on_each(), b"x" * 1_000_000
    try:
        millstream.init(url, secret_key="a secret for tests")
        front = serve.run(Front.bind(*[Streamer.options(name=name).bind(str(ledger)) for name in names]))
        parts = [serve.get_deployment_handle(name, sync=True) for name in names]

        through = front.through.call(large)
        streamed = [list(part.count.stream(20)) for part in parts]
        ours = [row for row in connections(cluster) if row["name"].startswith("ms:")]
        serve.shutdown()
    finally:
        cluster.stop()

    assert through == [large, large]
    assert streamed == [list(range(20))] * 3
    assert {row["laddr"] for row in ours} == {f"127.0.0.1:{port}" for port in cluster.tls_ports}


def connections(cluster: Cluster) -> list[dict[str, str]]:
    found = []
    for node in cluster.nodes:
        with node.connect_blocking() as client:
            found += client.client_list()
    return found
