"""The embedded server: one per state folder, durable there, gone with its owner."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from millstream import embedded
from millstream.config import ADVERT, find_settings, read_advert
from millstream.embedded import EmbeddedServer
from millstream.errors import BrokerUnavailableError
from tests.scenarios.processes import descendants, wait_for, wait_for_end

pytestmark = pytest.mark.processes

Start = Callable[[Path | None], EmbeddedServer]


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[EmbeddedServer] = []

    def go(folder: Path | None) -> EmbeddedServer:
        running.append(embedded.start(folder))
        return running[-1]

    yield go
    for server in running:
        end(server)


def end(server: EmbeddedServer) -> None:
    """As the exit of its owner does."""
    if server.guard.stdin is not None and not server.guard.stdin.closed:
        server.guard.stdin.close()
    server.guard.wait(20)


def test_server_is_found_while_it_runs(tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "state"
    assert not embedded.is_running(folder)

    server = start(folder)

    assert embedded.is_running(folder)
    assert find_settings(state=folder) == server.settings
    end(server)
    assert not embedded.is_running(folder)
    assert read_advert(folder) is None


def test_folder_keeps_its_secret_and_its_modes(tmp_path: Path, start: Start) -> None:
    first = start(tmp_path)
    end(first)

    second = start(tmp_path)

    assert second.settings.secret_key == first.settings.secret_key
    assert second.settings.url != first.settings.url
    for name in (ADVERT, "secret", "server.conf"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


def test_folders_secret_goes_with_its_address_whatever_the_environment_says(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MILLSTREAM_URL", raising=False)
    monkeypatch.setenv("MILLSTREAM_SECRET_KEY", "of another server")

    server = start(tmp_path)

    assert find_settings(state=tmp_path) == server.settings


def test_second_server_in_a_folder_is_refused_and_harms_nothing(tmp_path: Path, start: Start) -> None:
    start(tmp_path)
    configuration = (tmp_path / "server.conf").read_text()

    with pytest.raises(BrokerUnavailableError, match="another server starts in"):
        start(tmp_path)

    assert (tmp_path / "server.conf").read_text() == configuration
    assert embedded.is_running(tmp_path)


def test_advert_of_a_dead_server_or_of_a_foreign_one_does_not_count(tmp_path: Path, start: Start) -> None:
    other = start(tmp_path / "other")
    folder = tmp_path / "state"
    folder.mkdir()

    for url in ("redis://:pw@127.0.0.1:1/0", other.settings.url.replace("redis://:", "redis://:not")):
        (folder / ADVERT).write_text(json.dumps({"url": url, "secret_key": "ab"}))
        assert not embedded.is_running(folder)


@pytest.mark.parametrize("victim", ["guard", "server"])
def test_killed_guard_or_server_leaves_a_folder_to_start_in_again(tmp_path: Path, start: Start, victim: str) -> None:
    first = start(tmp_path)
    (server,) = descendants(first.guard.pid)

    os.kill(first.guard.pid if victim == "guard" else server, signal.SIGKILL)
    end(first)

    assert wait_for_end([server], 10.0) == set()
    start(tmp_path)
    assert embedded.is_running(tmp_path)


def test_guard_that_is_told_to_end_stops_the_server_in_order(tmp_path: Path, start: Start) -> None:
    server = start(tmp_path)

    server.guard.terminate()

    assert server.guard.wait(20) == 0
    wait_for(lambda: "ready to exit" in (tmp_path / "server.log").read_text(), 5.0, "an orderly end")


def test_temporary_server_leaves_no_folder(start: Start) -> None:
    server = start(None)
    assert server.folder.exists()

    end(server)

    assert not server.folder.exists()


def test_server_takes_no_more_than_half_of_the_memory_there_is(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("1000000000\n")
    monkeypatch.setattr(embedded, "CGROUP_LIMIT", limit)

    with redis.Redis.from_url(start(tmp_path / "state").settings.url) as client:
        found = client.config_get("maxmemory*")

    assert (found["maxmemory"], found["maxmemory-policy"]) == ("500000000", "noeviction")


def test_long_log_is_put_aside(tmp_path: Path, start: Start) -> None:
    (tmp_path / "server.log").write_text("x" * (embedded.MOST_LOG_BYTES + 1))

    end(start(tmp_path))

    assert (tmp_path / "server.log").stat().st_size < 10_000
    assert (tmp_path / "server.log.old").stat().st_size > embedded.MOST_LOG_BYTES
