"""Replicas on the test's own loop. One server is enough here; `tests/broker` covers what differs between them."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys
from millstream.config import Settings
from millstream.handles import engines
from tests.replica_helpers import Stage, keep_one_server
from tests.replicas.streams import Bench


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    keep_one_server(config, items, Path(__file__).parent)


@pytest.fixture
def connected(settings: Settings) -> Iterator[Settings]:
    """This process uses the test server, as after `millstream.init`."""
    engines.use(settings)
    yield settings
    engines.close_all()


@pytest.fixture
async def stage(connected: Settings) -> AsyncIterator[Stage]:
    """One deployment, `app.Model`, and its replicas: `replica = await stage.start(Model)`."""
    stage = Stage(connected)
    yield stage
    await stage.drain()


@pytest.fixture
async def bench(settings: Settings, redis: Control, keys: DeploymentKeys) -> AsyncIterator[Bench]:
    bench = Bench(settings, redis, keys)
    await bench.start()
    yield bench
    await bench.close()
