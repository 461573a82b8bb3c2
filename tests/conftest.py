"""Fixtures: servers, clients and settings, and the check after each test that nothing was left behind.

`redis` and `settings` run a test once per server. Choose with `--servers valkey,redis7,redis8,fake,cluster`, or with
MILLSTREAM_TEST_SERVERS. A test marked `fake` runs on fakeredis as well: for broker logic only, the real ones judge.
`cluster` runs all that is not marked `single_server`; without a choice it runs what is marked `on_cluster`.
"""

import math
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys
from millstream.config import Settings
from tests.leaks import find_leaks, find_lost, take_snapshot
from tests.servers import BY_DEFAULT, CLUSTER, FAKE, NAMES, AnyServer, Server, chosen_servers
from tests.shared_servers import SharedServers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--servers",
        default=os.environ.get("MILLSTREAM_TEST_SERVERS", ",".join(BY_DEFAULT)),
        help=f"comma-separated, out of {', '.join(NAMES)} (default: all but the cluster; those not installed are skipped, "
        "or fail in CI)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what is to run in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what tests start would ignore it, too
    config.addinivalue_line("markers", "fake: runs on fakeredis, too")
    config.addinivalue_line(
        "markers", "any_server: what it tries is not up to the server: runs on the first real one only"
    )
    config.addinivalue_line(
        "markers", "single_server: not for a cluster: about one server process (tests with `start_server` need no mark)"
    )
    config.addinivalue_line("markers", "on_cluster: runs on a cluster, too, when no servers were chosen")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """More than processors: half of the time a test waits for processes that start and end."""
    return math.ceil((os.cpu_count() or 1) * 1.5)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "server" in metafunc.fixturenames:
        metafunc.parametrize("server", _servers_of(metafunc), indirect=True, scope="session")


def _servers_of(metafunc: pytest.Metafunc) -> list[str]:
    """Those of the chosen servers that a test is for."""
    chosen = chosen_servers(metafunc.config)
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    servers = [name for name in chosen if name != FAKE or "fake" in marks]
    if "any_server" in marks:
        servers = [name for name in servers if name != FAKE][:1]
    if "on_cluster" in marks and chosen == list(BY_DEFAULT):
        servers.append(CLUSTER)
    if "single_server" in marks or "start_server" in metafunc.fixturenames:
        servers = [name for name in servers if name != CLUSTER]
    return servers


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def servers() -> Iterator[SharedServers]:
    """All servers of this session; each starts when it is first asked for."""
    servers = SharedServers()
    yield servers
    servers.stop()


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, servers: SharedServers) -> AnyServer:
    """One server after the other, shared by all tests. `redis` and `settings` are flushed; this is not."""
    return servers.get(request.param)


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Flushes the server before a test that uses one; afterwards looks for leaked keys and lost requests."""
    if "server" not in request.fixturenames:
        yield
        return
    server: AnyServer = request.getfixturevalue("server")
    with server.connect_blocking() as client:
        client.flushall()
        yield
        snapshot = take_snapshot(client)
    assert find_leaks(snapshot) == [], "keys without TTL that nothing owns"
    assert find_lost(snapshot) == [], "requests that are not in exactly one place"


@pytest.fixture
def settings(server: AnyServer) -> Settings:
    """The flushed server, with a secret."""
    return Settings(server.url, secret_key=b"a secret for tests")


@pytest.fixture
async def redis(server: AnyServer) -> AsyncIterator[Control]:
    """A client of the flushed server."""
    async with server.connect() as client:
        yield client


@pytest.fixture
def keys() -> DeploymentKeys:
    """The keys of the deployment that broker tests play with. Nothing is written; `deploy_config` does that."""
    return DeploymentKeys("ms", "app.Model")


@pytest.fixture
def start_server(server: AnyServer) -> Iterator[Callable[..., Server]]:
    """Start a private server of the current kind, with options: for tests that restart it, fill it or lock it."""
    started: list[Server] = []

    def start(*options: str) -> Server:
        started.append(Server(server.name, *options))
        return started[-1].start()

    yield start
    for private in started:
        private.stop()
