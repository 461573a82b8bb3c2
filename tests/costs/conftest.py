"""One deployment on one replica, and nothing that goes by the clock. One server is enough here."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from millstream.broker.lease import Lease
from millstream.config import Settings
from millstream.handles import engines, lines, sending
from millstream.replicas import intake, pace, replica
from tests.costs.rig import Rig
from tests.replica_helpers import Serving, keep_one_server

NEVER_S = 3600.0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    keep_one_server(config, items, Path(__file__).parent)


@pytest.fixture
def without_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine more of what is done every second falls on a request, and batches are cut short."""
    monkeypatch.setattr(replica, "HOUSEKEEPING_S", NEVER_S)
    monkeypatch.setattr(Lease, "look_every_s", NEVER_S)
    monkeypatch.setattr(lines, "LOOK_EVERY_S", NEVER_S)
    monkeypatch.setattr(intake, "DIRECT_S", NEVER_S)
    monkeypatch.setattr(pace, "AHEAD_S", NEVER_S)  # all requests are short
    monkeypatch.setattr(sending, "ROWS_S", NEVER_S)


@pytest.fixture
def rig(without_clock: None, settings: Settings) -> Iterator[Rig]:
    """A deployment, a replica on a thread of its own, and a loop for its callers."""
    engines.use(settings)
    serving = Serving(settings)
    rig = Rig(serving)
    yield rig
    rig.close()
    engines.close_all()
    serving.close()
