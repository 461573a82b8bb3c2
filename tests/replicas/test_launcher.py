"""One pass of the launcher where it could stumble; whole process trees are in `tests/scenarios`."""

import pytest

from millstream.config import Settings
from millstream.replicas.launcher import Launcher


@pytest.mark.anyio
async def test_fewer_replicas_wanted_while_some_are_being_started_is_no_error(settings: Settings) -> None:
    launcher = Launcher(settings, "node")
    for _ in range(3):
        launcher._starts.begin("app.Model", "v")  # forks under way: they have no names yet, and cannot be drained

    await launcher.step()

    await launcher._client.aclose()
