"""Replicas to call. One server is enough here; `tests/broker` covers what differs between them."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from millstream.config import Settings
from millstream.handles import engines, lines
from tests.handles.held import Notes
from tests.replica_helpers import Serving, keep_one_server
from tests.servers import Server


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    keep_one_server(config, items, Path(__file__).parent)


@pytest.fixture
def connected(settings: Settings) -> Iterator[Settings]:
    """This process uses the test server, as after `millstream.init`."""
    engines.use(settings)
    yield settings
    engines.close_all()


@pytest.fixture
def serving(connected: Settings) -> Iterator[Serving]:
    """Deploys and serves: `handle = serving(Model, max_ongoing_requests=2)`."""
    serving = Serving(connected)
    yield serving
    serving.close()


@pytest.fixture
def own_server(start_server: Callable[..., Server]) -> Iterator[Server]:
    """A server that may be killed and started again; this process uses it. What it has acknowledged it has on disk."""
    server = start_server("--appendonly", "yes", "--appendfsync", "always")
    engines.use(Settings(server.url, secret_key=b"a secret for tests"))
    yield server
    engines.close_all()


@pytest.fixture
def serving_there(own_server: Server) -> Iterator[Serving]:
    """As `serving`, on `own_server`."""
    serving = Serving(engines.settings())
    yield serving
    if not own_server.is_up:
        own_server.start()
    with contextlib.suppress(AssertionError):  # its loop may complain about what the outage has cut short
        serving.close()


@pytest.fixture
def notes() -> Iterator[Notes]:
    """To be asked for behind `serving`: at the end it lets go what still runs there."""
    notes = Notes()
    yield notes
    notes.gate.open()


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is deleted twice a second is deleted fifty times a second."""
    monkeypatch.setattr(lines, "LOOK_EVERY_S", 0.02)
