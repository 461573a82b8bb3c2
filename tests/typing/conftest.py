"""Replicas to call. One server is enough here; `tests/broker` covers what differs between them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from millstream.config import Settings
from millstream.handles import engines
from tests.replica_helpers import Serving, keep_one_server


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    keep_one_server(config, items, Path(__file__).parent)


@pytest.fixture
def serving(settings: Settings) -> Iterator[Serving]:
    """Deploys and serves: `handle = serving(Model)`, or `serving.graph(Front.bind(Model.bind()))`."""
    engines.use(settings)
    serving = Serving(settings)
    yield serving
    serving.close()
    engines.close_all()
