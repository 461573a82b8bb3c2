"""A whole process tree over records that somebody has written over: nobody dies, says it again and again, or executes it."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

import millstream
from millstream import runtime, serve
from millstream.broker.keys import DeploymentKeys, Keys
from millstream.errors import DeployFailedError
from tests.scenarios.apps import Worker
from tests.scenarios.processes import descendants, find, me, wait_for, wait_for_end
from tests.security.hostile import Canary, Enemy
from tests.servers import Server

pytestmark = [pytest.mark.processes, pytest.mark.any_server]
UNSIGNED = b"the record without its signature"
TAG = "default.Worker"
ALL, KEYS = Keys("ms"), DeploymentKeys("ms", TAG)


@pytest.fixture
def installed(
    start_server: Callable[..., Server],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[Enemy]:
    """A client of a server that `serve.run` will use."""
    server = start_server()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MILLSTREAM_URL", server.url)
    monkeypatch.setenv("MILLSTREAM_SECRET_KEY", "a secret for tests")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    before = descendants(os.getpid())
    with redis.Redis.from_url(server.url) as client:
        yield client
    started = descendants(os.getpid()) - before
    if runtime.is_initialized():
        serve.shutdown()
    millstream.shutdown()
    assert not wait_for_end(started, 20.0)


def passes(client: Enemy) -> int:
    """How often records have been read: launcher and autoscaler do so once a second."""
    return int(client.info("commandstats")["cmdstat_hgetall"]["calls"])


def test_launcher_and_autoscaler_go_on_over_garbage_and_recover(
    installed: Enemy, capfd: pytest.CaptureFixture[str]
) -> None:
    handle = serve.run(Worker.bind())
    pid = handle.pid.call()
    others = {word: find(me(), word) for word in ("launcher", "autoscaler")}
    (node,) = [name.decode() for name in installed.hkeys(ALL.nodes)]
    fields = [(ALL.apps, "default"), (ALL.nodes, node), (ALL.node_plan(node), TAG), (KEYS.config, "config"),
              (KEYS.status, "target"), (KEYS.replicas, "x")]  # fmt: skip
    before = [(key, field, installed.hget(key, field)) for key, field in fields]

    for garbage in (b"\xff\0", b"[" * 5000, json.dumps({"replicas": "many"}).encode(), UNSIGNED):
        for key, field, value in before:
            installed.hset(key, field, (value or b"").partition(b" ")[2] if garbage is UNSIGNED else garbage)
        installed.publish(ALL.node_wake(node), garbage)
        so_far = passes(installed)
        wait_for(lambda so_far=so_far: passes(installed) > so_far + 12, 30, "some passes over it")  # type: ignore[misc]
        assert handle.pid.call() == pid
    for key, field, value in before:
        if value is None:
            installed.hdel(key, field)
        else:
            installed.hset(key, field, value)

    assert {word: find(me(), word) for word in others} == others, "somebody has died of it"
    os.kill(pid, signal.SIGKILL)
    assert handle.pid.call() != pid
    said = "".join(capfd.readouterr())
    assert "cannot be read" in said, said
    assert "Traceback" not in said, said


def test_definition_that_nobody_signed_is_not_opened_and_the_deployment_fails(installed: Enemy, canary: Canary) -> None:
    handle = serve.run(Worker.bind())
    pid = handle.pid.call()
    (forged, *_) = canary.envelopes("ms", TAG, b"definition")
    installed.set(KEYS.definition, forged)

    for parent in find(me(), "warm"):  # what has the definition in memory
        os.kill(parent, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)

    with pytest.raises(DeployFailedError, match="SignatureError"):
        handle.pid.call()
