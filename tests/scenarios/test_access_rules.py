"""Each part of millstream with a user of its own, and the rights that the documentation gives it: no more, and no less."""

# mypy: disable-error-code="attr-defined"
# (mypy does not apply what a class decorator returns: https://github.com/python/mypy/issues/3135)

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import millstream
from millstream import serve
from millstream.broker.connection import open_control
from millstream.config import Settings
from millstream.dashboard.reading import look
from millstream.errors import DeployFailedError, MillstreamError, RequestCancelledError, RequestTimeoutError
from tests.access import make_user, refused
from tests.cli.shell import Shell
from tests.servers import Server

pytestmark = [pytest.mark.processes, pytest.mark.any_server]
SECRET = "a secret for tests"
NODE, AUTOSCALER, CALLER, VIEWER = "ms-node", "ms-autoscaler", "ms-caller", "ms-viewer"
GRAPH = """
from millstream import serve
from tests.scenarios.streamers import Streamer

@serve.deployment
class Front:
    def __init__(self, streamer):
        self.streamer = streamer

    async def through(self, value):
        return await (await self.streamer.echo.remote(value))

    async def both(self, value):
        return await self.streamer.echo.call(await self.streamer.echo.remote(value))

app = Front.bind(Streamer.options(autoscaling_config={"min_replicas": 0, "max_replicas": 2, "initial_replicas": 1}).bind("LEDGER"))
"""


@pytest.fixture
def private(start_server: Callable[..., Server]) -> Server:
    return start_server()


@pytest.fixture
def shell(tmp_path: Path, ledger: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path, MILLSTREAM_SECRET_KEY=SECRET)
    shell.write("graph.py", GRAPH.replace("LEDGER", str(ledger)))
    yield shell
    millstream.shutdown()  # while there is a server
    assert list(shell.close()) == []


def start_parts(shell: Shell, server: Server, **without: str) -> None:
    """A launcher and an autoscaler, some right of one left out; deployed by the user who may do all."""
    for part, user in (("launcher", NODE), ("autoscaler", AUTOSCALER)):
        left_out = without.get(part, "").split()
        shell.start(part, "--url", make_user(server, user, *left_out))


def deploy(shell: Shell, server: Server) -> None:
    said = shell.millstream("deploy", "graph:app", "--url", make_user(server, "millstream"))
    assert said.code == 0, said.err


def test_every_part_works_with_the_rights_it_is_given(private: Server, shell: Shell) -> None:
    start_parts(shell, private)
    deploy(shell, private)
    millstream.init(make_user(private, CALLER), secret_key=SECRET)
    streamer = serve.get_deployment_handle("Streamer", sync=True)
    front = serve.get_deployment_handle(serve.get_app_handle("default").deployment_name, sync=True)
    large = b"x" * 1_000_000

    assert front.through.call(large) == large
    assert front.both.call("small") == "small"
    assert list(streamer.echo.map(range(300))) == list(range(300))
    assert list(streamer.count.stream(30)) == list(range(30))
    assert [len(blob) for blob in streamer.blobs.stream(3, 100_000, 0.0)] == [100_000] * 3
    assert millstream.get(streamer.echo.remote(millstream.put(large))) == large
    assert streamer.echo.call(streamer.echo.remote(front.through.remote("chained"))) == "chained"
    assert streamer.echo.options(delay_s=0.1).call("later") == "later"
    with pytest.raises(RequestTimeoutError):
        list(streamer.count.options(timeout_s=0.3).stream(1_000, 0.05))
    held = streamer.count.options(delay_s=3600, block_until="queued", stream=False).remote(1)
    assert held.cancel()
    with pytest.raises(RequestCancelledError):
        held.result(timeout=10)
    with pytest.raises(Exception, match="multiply"):
        streamer.make.call("no number")

    os.kill(streamer.pid.call(), signal.SIGKILL)  # it is buried, and another takes its place
    assert streamer.echo.call("again") == "again"

    status = shell.millstream("status", "--url", make_user(private, VIEWER))
    seen = asyncio.run(look_around(Settings(make_user(private, VIEWER), secret_key=SECRET.encode())))
    removed = shell.millstream("delete", "default", "--url", make_user(private, "millstream"))
    with private.connect_blocking() as client:
        assert refused(client) == []
    assert status.code == 0 and "Streamer" in status.out
    assert seen == {"default.Front", "default.Streamer"}
    assert removed.code == 0, removed.err


async def look_around(settings: Settings) -> set[str]:
    async with open_control(settings, "ms:dashboard") as client:
        return {view.tag for view in (await look(client, settings)).views}


def test_who_only_looks_can_change_nothing(private: Server, shell: Shell) -> None:
    url = make_user(private, VIEWER)

    said = shell.millstream("deploy", "graph:app", "--url", url)

    assert said.code == 1
    assert "NOPERM" in said.err.splitlines()[-1]
    with private.connect_blocking() as client:
        assert client.dbsize() == 0


def test_caller_without_a_right_is_told_so_at_once(private: Server, shell: Shell) -> None:
    start_parts(shell, private)
    deploy(shell, private)
    for rights in ("+xadd", "+evalsha +eval", "+ssubscribe", "~{ms:*}:open", "&{ms:*}:reply:*", "+client|setname"):
        url, started = make_user(private, CALLER, *rights.split()), time.monotonic()

        with pytest.raises(MillstreamError, match="NOPERM"):
            call(url)

        assert time.monotonic() - started < 10.0, rights


def call(url: str) -> None:
    millstream.shutdown()  # what it may not do now, its connections may have done before
    millstream.init(url, secret_key=SECRET)
    serve.get_deployment_handle("Streamer", sync=True).echo.call("here")


def test_replica_without_a_right_fails_its_deployment_with_the_reason(private: Server, shell: Shell) -> None:
    start_parts(shell, private, launcher="+xreadgroup")
    shell.millstream("deploy", "graph:app", "--timeout", "0.1", "--url", make_user(private, "millstream"))
    millstream.init(make_user(private, CALLER), secret_key=SECRET)

    with pytest.raises(DeployFailedError, match=r"NOPERM .*'xreadgroup'"):
        serve.get_deployment_handle("Streamer", sync=True).echo.options(timeout_s=30).call("here")


@pytest.mark.parametrize(("part", "user", "right"), [("launcher", NODE, "+hset"), ("autoscaler", AUTOSCALER, "+incr")])
def test_part_without_a_right_ends_with_one_line(
    private: Server, shell: Shell, part: str, user: str, right: str
) -> None:
    running = shell.start(part, "--url", make_user(private, user, right))

    assert running.wait() == 1
    assert "NOPERM" in running.lines[-1]
