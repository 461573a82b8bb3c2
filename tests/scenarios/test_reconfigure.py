"""Redeploys that need no restart, on real processes: the replicas stay, their objects keep their state."""

# mypy: disable-error-code="attr-defined"
# (mypy does not apply what a class decorator returns: https://github.com/python/mypy/issues/3135)

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import millstream
from millstream import serve
from millstream.broker.registry import Registry
from millstream.errors import DeployFailedError
from millstream.handles import engines
from millstream.runtime import with_registry
from millstream.status import DeploymentStatus
from tests.scenarios.processes import wait_for
from tests.scenarios.tuned import Tuned, TunedInThreads
from tests.servers import Server

pytestmark = pytest.mark.processes


def status(name: str = "Tuned") -> DeploymentStatus:
    return serve.status().applications["default"].deployments[name]


def pids(name: str = "Tuned") -> set[int]:
    return {replica.pid for replica in status(name).replicas}


def run(**options: Any) -> Any:
    return serve.run(Tuned.options(**options).bind())


def wait_for_replicas(count: int, name: str = "Tuned") -> set[int]:
    wait_for(lambda: status(name).replica_states == {"RUNNING": count}, 30.0, f"{count} replicas")
    return pids(name)


def test_new_user_config_reaches_the_running_replicas_before_run_returns() -> None:
    handle = run(num_replicas=2, user_config={"n": 1})
    before = wait_for_replicas(2)
    handle.call()

    for n in (2, 3):
        run(num_replicas=2, user_config={"n": n})
        answers = [handle.call() for _ in range(30)]

        assert [config for _, config, _ in answers] == [{"n": n}] * 30
        assert {pid for pid, _, _ in answers} <= before == pids()
    assert max(calls for _, _, calls in answers) > 15  # the objects have kept their counts


def test_other_options_change_without_a_call_of_reconfigure() -> None:
    handle = run(user_config={"n": 1}, max_ongoing_requests=1)
    (pid,) = wait_for_replicas(1)

    run(user_config={"n": 1}, max_ongoing_requests=10, num_replicas=3, graceful_shutdown_timeout_s=1, max_attempts=2)

    assert pid in wait_for_replicas(3)
    assert {handle.call()[1]["n"] for _ in range(10)} == {1}


def test_blocking_reconfigure_works_too() -> None:
    handle = serve.run(TunedInThreads.bind())
    (pid, config) = handle.call()

    serve.run(TunedInThreads.options(user_config={"sleep": 0.1}).bind())

    assert config is None
    assert handle.call() == (pid, {"sleep": 0.1})


def test_reconfigure_waits_for_what_runs_and_what_comes_waits_for_it(tmp_path: Path) -> None:
    handle = run(user_config={"n": 1}, graceful_shutdown_timeout_s=60)
    (pid,) = wait_for_replicas(1)
    running = handle.hold.remote(str(tmp_path / "go"))

    deploying = threading.Thread(target=run, kwargs={"user_config": {"n": 2}, "graceful_shutdown_timeout_s": 60})
    deploying.start()
    wait_for(lambda: deployed_config()["user_config"] == {"n": 2}, what="the new config")
    late = []

    def is_one_waiting() -> bool:
        late.append(handle.options(block_until="queued").remote())
        return bool(millstream.wait(late[-1:], timeout=0.2)[1])

    wait_for(is_one_waiting, what="a request that waits for the end of what runs")
    (tmp_path / "go").touch()
    deploying.join(20)

    assert running.result(timeout=10) == (pid, {"n": 1})
    assert {(p, config["n"]) for p, config, _ in millstream.get(late, timeout=10)} <= {(pid, 1), (pid, 2)}
    assert handle.call()[:2] == (pid, {"n": 2})


def deployed_config(name: str = "Tuned") -> Any:
    async def read(registry: Registry) -> Any:
        current = await registry.current(f"default.{name}")
        assert current is not None
        return {"revision": current.revision, "user_config": current.config.user_config}

    return with_registry(read)


def test_error_in_reconfigure_fails_the_deploy_and_the_old_config_serves_on() -> None:
    handle = run(num_replicas=3, user_config={"n": 1})
    before = wait_for_replicas(3)

    with pytest.raises(DeployFailedError, match=r"goes on as it was before.*ValueError: no such threshold") as caught:
        run(num_replicas=3, user_config={"raise": "no such threshold"})

    assert 'raise ValueError(config.get("raise"))' in caught.value.remote_traceback
    assert {tuple(handle.call()[:2][1].items()) for _ in range(30)} == {(("n", 1),)}
    assert wait_for_replicas(3) == before
    assert status().status == "HEALTHY" and "no such threshold" in status().message
    run(num_replicas=3, user_config={"n": 2})
    assert {handle.call()[1]["n"] for _ in range(30)} == {2}
    assert pids() == before


def test_replica_that_cannot_go_back_is_replaced_and_answers_nobody_meanwhile() -> None:
    handle = run()  # no user_config before, so there is none to go back to
    (pid,) = wait_for_replicas(1)

    with pytest.raises(DeployFailedError, match="no way back"):
        run(user_config={"raise": "no way back"})
    answers = [handle.call() for _ in range(20)]

    assert {config for _, config, _ in answers} == {None}
    assert pid not in {answered for answered, _, _ in answers}


def test_config_that_kills_its_replica_kills_one_only() -> None:
    handle = run(num_replicas=3, user_config={"n": 1})
    before = wait_for_replicas(3)

    with pytest.raises(DeployFailedError, match="exited with code 7 while starting"):
        run(num_replicas=3, user_config={"die": True})

    assert {handle.call()[1]["n"] for _ in range(30)} == {1}
    assert len(wait_for_replicas(3) & before) == 2


@pytest.fixture
def second_node() -> Iterator[None]:
    """Another launcher, for the server that this process has started."""
    serve.start()
    environment = {**os.environ, **engines.settings().to_environment()}
    command = [sys.executable, "-m", "millstream", "launcher", "--node", "second"]
    launcher = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    yield
    launcher.terminate()
    launcher.wait(20)


def nodes() -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for replica in status().replicas:
        found.setdefault(replica.node, set()).add(replica.pid)
    return found


@pytest.mark.parametrize("is_for_good", [False, True])
def test_replicas_on_several_nodes_go_forward_and_back_together(second_node: None, is_for_good: bool) -> None:
    wait_for(lambda: len(node_names()) == 2, 20.0, "a second node")
    handle = run(num_replicas=4, user_config={"n": 1})
    before = wait_for_replicas(4)
    assert sorted(len(there) for there in nodes().values()) == [2, 2]
    (last,) = sorted(nodes()["second"])[-1:]

    with pytest.raises(DeployFailedError, match="goes on as it was before"):
        run(num_replicas=4, user_config={"n": 2, "raise_in": last, "is_for_good": is_for_good})

    wait_for(lambda: all(config_of(handle) == {"n": 1} for _ in range(40)), 20.0, "the old config everywhere")
    after = wait_for_replicas(4)
    assert last in after
    assert is_for_good or after == before
    run(num_replicas=4, user_config={"n": 3})
    assert {config_of(handle)["n"] for _ in range(40)} == {3}


def config_of(handle: Any) -> Any:
    return handle.call()[1]


def node_names() -> list[str]:
    async def read(registry: Registry) -> list[str]:
        return list(await registry.nodes())

    return with_registry(read)


def test_replica_killed_while_it_reconfigures_is_replaced_by_one_of_the_new_config(tmp_path: Path) -> None:
    handle = run(user_config={"n": 1})
    (pid,) = wait_for_replicas(1)
    config = {"n": 2, "wait_for": str(tmp_path / "go")}

    deploying = threading.Thread(target=run, kwargs={"user_config": config})
    deploying.start()
    wait_for((tmp_path / "go.waiting").exists)
    late = handle.options(block_until="queued").remote()
    os.kill(pid, signal.SIGKILL)
    (tmp_path / "go").touch()
    deploying.join(20)

    assert late.result(timeout=10)[1] == config
    assert pid not in pids()


def test_of_two_quick_redeploys_the_last_one_counts(tmp_path: Path) -> None:
    handle = run(user_config={"n": 1})
    (pid,) = wait_for_replicas(1)
    slow = {"n": 2, "wait_for": str(tmp_path / "go")}
    first, outcome = deploy_that_is_replaced(user_config=slow)
    wait_for(lambda: deployed_config()["user_config"] == slow)
    second = threading.Thread(target=run, kwargs={"user_config": {"n": 3}})
    second.start()
    first.join(10)
    (tmp_path / "go").touch()
    second.join(20)

    assert outcome == ["replaced"]
    assert handle.call()[:2] == (pid, {"n": 3})


def deploy_that_is_replaced(**options: Any) -> tuple[threading.Thread, list[str]]:
    """Deploy in a thread; it says so when another deploy has come before this one was through."""
    outcome: list[str] = []

    def deploy() -> None:
        with pytest.raises(DeployFailedError, match="replaced while it was coming up"):
            run(**options)
        outcome.append("replaced")

    thread = threading.Thread(target=deploy)
    thread.start()
    return thread, outcome


def test_replica_that_starts_while_the_config_changes_ends_with_the_new_one(tmp_path: Path) -> None:
    slow = {"n": 1, "wait_for": str(tmp_path / "go")}
    first, outcome = deploy_that_is_replaced(num_replicas=2, user_config=slow)
    wait_for(lambda: millstream.is_initialized() and "default" in serve.status().applications)
    wait_for(lambda: len(status().replicas) == 2, what="two replicas that start")

    second = threading.Thread(target=run, kwargs={"num_replicas": 2, "user_config": {"n": 2}})
    second.start()
    first.join(10)
    started = pids()
    (tmp_path / "go").touch()
    second.join(20)

    handle = serve.get_deployment_handle("Tuned", sync=True)
    assert outcome == ["replaced"]
    assert {(config["n"], pid in started) for pid, config, _ in (handle.call() for _ in range(20))} == {(2, True)}


@pytest.mark.single_server
def test_server_that_restarts_meanwhile_delays_the_update_only(tmp_path: Path) -> None:
    server = Server("valkey", "--appendonly", "yes", "--appendfsync", "always").start()
    try:
        millstream.init(server.url, secret_key="a secret")
        handle = run(user_config={"n": 1})
        (pid,) = wait_for_replicas(1)
        config = {"n": 2, "wait_for": str(tmp_path / "go")}
        deploying = threading.Thread(target=run, kwargs={"user_config": config}, daemon=True)
        deploying.start()
        wait_for(lambda: deployed_config()["user_config"] == config)

        server.kill()
        (tmp_path / "go").touch()
        server.start()
        deploying.join(20)

        assert not deploying.is_alive()
        assert handle.call()[:2] == (pid, config)
    finally:
        millstream.shutdown()
        server.stop()


def test_request_that_does_not_end_in_time_makes_way_by_another_replica(tmp_path: Path) -> None:
    handle = run(user_config={"n": 1}, graceful_shutdown_timeout_s=0.5)
    (pid,) = wait_for_replicas(1)
    ref = handle.hold.remote(str(tmp_path / "go"))

    run(user_config={"n": 2}, graceful_shutdown_timeout_s=0.5)
    answer = handle.call()
    (tmp_path / "go").touch()

    assert answer[0] != pid and answer[1] == {"n": 2}
    assert ref.result(timeout=10)[1] in ({"n": 1}, {"n": 2})  # it ended in time, or ran again elsewhere


@pytest.mark.parametrize(
    "change", [{"version": "2"}, {"sync_threads": 2}, {"start_method": "spawn"}, {"user_config": None}]
)
def test_what_a_process_cannot_change_restarts_it(change: dict[str, Any]) -> None:
    handle = run(user_config={"n": 1})
    (pid,) = wait_for_replicas(1)

    run(**{"user_config": {"n": 1}, **change})

    wait_for(lambda: pid not in pids(), what="the end of the old replica")
    assert handle.call()[0] != pid


def test_deploy_after_a_failure_starts_afresh_though_nothing_has_changed(tmp_path: Path) -> None:
    def gone() -> None:
        assert (tmp_path / "model").exists(), "no model"

    class Model:
        def __init__(self) -> None:
            gone()

        async def __call__(self) -> str:
            return "here"

    application = serve.deployment(Model).bind()
    with pytest.raises(DeployFailedError, match="no model"):
        serve.run(application)

    (tmp_path / "model").touch()

    assert serve.run(application).call() == "here"
