"""One server is enough here; `tests/broker` covers what differs between them."""

from pathlib import Path

import pytest

from tests.replica_helpers import keep_one_server


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "every_server: runs on all chosen servers, also where one is enough for the others"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    keep_one_server(config, items, Path(__file__).parent)
