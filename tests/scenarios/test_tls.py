"""An application on a server that is reached by TLS: its processes, large values and streams included."""

# mypy: disable-error-code="attr-defined"
# (mypy does not apply what a class decorator returns: https://github.com/python/mypy/issues/3135)

from pathlib import Path

import pytest
import redis

import millstream
from millstream import serve
from tests.scenarios.streamers import Streamer
from tests.tls import start_tls_server

pytestmark = pytest.mark.processes


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
