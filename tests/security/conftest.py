"""What an enemy writes, against real parts on a real server. One server is enough here."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from millstream.config import Settings
from millstream.handles import engines
from tests.replica_helpers import Serving, keep_one_server
from tests.security.hostile import Canary, Enemy
from tests.servers import AnyServer


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    keep_one_server(config, items, Path(__file__).parent)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    """Dead after the test if anything has unpickled what the test wrote."""
    canary = Canary(tmp_path / "was-here")
    yield canary
    assert canary.is_alive, "what nobody had signed was unpickled"


@pytest.fixture
def enemy(server: AnyServer) -> Iterator[Enemy]:
    """A client that may write what it likes; all of it is gone after the test."""
    with server.connect_blocking() as client:
        yield client
        client.flushall()


@pytest.fixture
def serving(settings: Settings, enemy: Enemy) -> Iterator[Serving]:
    """Deploys and serves; this process is a caller, too."""
    engines.use(settings)
    serving = Serving(settings)
    yield serving
    serving.close()
    engines.close_all()
