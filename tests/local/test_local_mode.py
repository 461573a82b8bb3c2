"""What only local mode has: replicas on threads of this process, on a private server, usable from mocks; and their end."""

# mypy: disable-error-code="attr-defined"
# (mypy does not apply what a class decorator returns: https://github.com/python/mypy/issues/3135)

import asyncio
import os
import signal
import threading
import time
from typing import Any
from unittest import mock

import pytest

import millstream
from millstream import runtime, serve
from millstream.broker.records import NodeRecord
from millstream.broker.registry import Registry
from millstream.config import DeploymentConfig, Settings
from millstream.errors import ConfigError, DeployFailedError
from millstream.replicas import local as local_module
from millstream.replicas.thread import PREFIX, Recipe
from millstream.runtime import with_registry
from tests.local import apps
from tests.local.apps import Adder, Holding, Model, Pipeline, double
from tests.local.conftest import Mode
from tests.scenarios.processes import descendants, wait_for, wait_for_end
from tests.timing import timed

pytestmark = pytest.mark.processes


SIGNING = "millstream-signing"  # a pool of the process for large values, which other tests may have started


def ours() -> set[str]:
    names = {thread.name for thread in threading.enumerate()}
    return {name for name in names if name.startswith(PREFIX) and not name.startswith(SIGNING)}


# how it is asked for


def test_replicas_run_in_this_process(local: Mode) -> None:
    local(Model.bind())

    (replica,) = serve.status().applications["default"].deployments["Model"].replicas

    assert (replica.pid, replica.node) == (os.getpid(), "local")


@pytest.mark.parametrize("how", ["local", "ray", "environment"])
def test_it_is_asked_for_in_three_ways(local: Mode, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "environment":
        monkeypatch.setenv("MILLSTREAM_LOCAL", "1")
    options: dict[str, Any] = {"local": {"local": True}, "ray": {"_local_testing_mode": True}, "environment": {}}[how]

    serve.run(double.bind(), **options)

    assert runtime.local_node() is not None


def test_what_the_call_says_goes_over_the_environment(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_LOCAL", "1")
    started: list[str] = []
    monkeypatch.setattr(serve, "ensure_running", lambda: started.append("processes"))
    monkeypatch.setattr(serve, "ensure_local", lambda: started.append("threads"))

    serve.start(local=False)
    serve.start()
    monkeypatch.setenv("MILLSTREAM_LOCAL", "0")
    serve.start()

    assert started == ["processes", "threads", "processes"]


def test_start_brings_the_server_up_ahead_of_the_first_application(local: Mode) -> None:
    serve.start(local=True)

    assert millstream.is_initialized()
    assert local(double.bind()).call(1) == 2


def test_server_of_the_environment_is_left_alone(local: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_URL", "redis://127.0.0.1:1")
    monkeypatch.setenv("MILLSTREAM_SECRET_KEY", "of production")

    assert local(double.bind()).call(1) == 2


def test_server_that_was_chosen_is_used(local: Mode, settings: Settings) -> None:
    millstream.init(settings.url, namespace="chosen", secret_key=settings.secret_key)

    assert local(double.bind()).call(1) == 2

    assert set(with_registry(Registry.apps)) == {"default"}
    assert not runtime.owns_processes()
    serve.shutdown()


async def register_a_launcher(registry: Registry) -> None:
    record = NodeRecord("elsewhere", "h", 1, 1)
    await registry.client.hset(registry.keys.nodes, "elsewhere", registry.signer.write(record, "elsewhere"))
    await registry.client.set(registry.keys.node_lease("elsewhere"), "1", px=60_000)


async def unregister_it(registry: Registry) -> None:
    await registry.client.delete(registry.keys.nodes, registry.keys.node_lease("elsewhere"))


def test_launchers_on_the_same_server_are_refused(local: Mode, settings: Settings) -> None:
    millstream.init(settings.url, secret_key=settings.secret_key)
    with_registry(register_a_launcher)

    with pytest.raises(ConfigError, match="node elsewhere on this server would run them, too"):
        local(double.bind())

    with_registry(unregister_it)


def test_both_modes_at_once_are_refused(local: Mode) -> None:
    local(double.bind())

    with pytest.raises(ConfigError, match="serves in local mode"):
        serve.run(double.bind(), local=False)
    with pytest.raises(ConfigError, match="serves in local mode"):
        serve.start()
    assert runtime._tree is not None and not runtime._tree.has("launcher")


def test_other_server_ends_what_runs_on_the_last_one(local: Mode, settings: Settings) -> None:
    local(double.bind())

    millstream.init(settings.url, secret_key=settings.secret_key)

    assert ours() <= {"millstream-engine"}
    assert serve.status().applications == {}


# what is served


def test_module_attributes_can_be_patched(local: Mode) -> None:
    handle = local(apps.Patched.bind())

    with mock.patch.object(apps, "load", return_value="a fake"):
        assert handle.call() == "a fake"
    assert handle.call() == "the real one"


def test_methods_can_be_patched(local: Mode) -> None:
    with mock.patch.object(Model.func_or_class, "suspending", mock.AsyncMock(return_value="a fake")) as fake:
        assert local(Model.bind()).suspending.call(1) == "a fake"

    fake.assert_awaited_once_with(1)


@pytest.mark.parametrize("kind", [mock.Mock, mock.AsyncMock])
def test_mock_can_be_a_deployment(local: Mode, kind: type[mock.Mock]) -> None:
    fake = kind(side_effect=lambda x: x + 1)

    handle = local(Pipeline.bind(serve.deployment(name="Fake")(fake).bind(), Adder.bind(10)))

    assert handle.call(0) == 11
    fake.assert_called_once_with(0)


def test_class_of_a_test_sees_the_variables_of_the_test(local: Mode) -> None:
    seen: list[int] = []
    lock = threading.Lock()  # by value, as for a process, this could not travel

    @serve.deployment
    class Probe:
        def __call__(self, x: int) -> None:
            with lock:
                seen.append(x)

    local(Probe.bind()).call(7)

    assert seen == [7]


def test_breakpoint_stops_in_the_method(local: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.breakpointhook", lambda: stopped.append(threading.current_thread().name))
    stopped: list[str] = []

    @serve.deployment
    def stop() -> None:
        breakpoint()  # noqa: T100

    local(stop.bind()).call()

    (thread,) = stopped
    assert thread.startswith("millstream-sync")


def test_print_goes_where_the_test_looks(local: Mode, capsys: pytest.CaptureFixture[str]) -> None:
    @serve.deployment
    def speak() -> None:
        print("from inside")

    local(speak.bind()).call()

    assert capsys.readouterr().out == "from inside\n"


@pytest.mark.parametrize(
    ("options", "replicas"),
    [
        ({"num_replicas": 3}, 3),
        ({"num_replicas": 0}, 0),
        ({"num_replicas": "auto"}, 1),
        ({"autoscaling_config": {"min_replicas": 0, "max_replicas": 5}}, 1),
        ({"autoscaling_config": {"min_replicas": 2, "max_replicas": 5}}, 2),
        ({"autoscaling_config": {"min_replicas": 1, "max_replicas": 5, "initial_replicas": 4}}, 4),
    ],
)
def test_as_many_replicas_as_at_first_and_one_at_least(options: dict[str, Any], replicas: int) -> None:
    assert Recipe(None, b"", DeploymentConfig().updated(options)).replicas == replicas


def test_scaled_deployment_serves(local: Mode) -> None:
    handle = local(Model.options(autoscaling_config={"min_replicas": 0, "max_replicas": 5}).bind())

    assert handle.call(1) == 1
    deployment = serve.status().applications["default"].deployments["Model"]
    assert (deployment.status, deployment.target_replicas) == ("HEALTHY", 1)
    assert deployment.message == "local mode: nothing is scaled"


def test_arguments_that_cannot_be_unpickled_are_told(local: Mode) -> None:
    with pytest.raises(DeployFailedError, match="unpickling its arguments raised RuntimeError: not here"):
        local(Model.bind(apps.NotHere()))


# the life of replicas


def test_new_version_answers_from_the_moment_that_run_returns(local: Mode) -> None:
    for amount in range(10):
        assert local(Adder.options(num_replicas=2).bind(amount)).call(1) == amount + 1


def test_replica_that_still_runs_something_does_not_hold_up_the_next_version(local: Mode) -> None:
    handle = local(Holding.bind())
    ref = handle.hold.remote("held")
    handle.let_go_soon.remote()

    assert local(Model.options(name="Holding").bind()).call("new") == "new"

    assert ref.result(timeout=10) == "held"


def test_lease_outlasts_a_debugger(local: Mode) -> None:
    local(Model.bind())

    async def ttl_ms(registry: Registry) -> int:
        keys = registry.keys_of("default.Model")
        (name,) = await registry.client.hkeys(keys.replicas)
        return int(await registry.client.pttl(keys.lease(name.decode())))

    wait_for(lambda: with_registry(ttl_ms) > 60_000, what="a long lease")


def test_replica_that_dies_is_started_again_and_its_request_with_it(
    local: Mode, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_module, "TICK_S", 0.05)
    attempts: list[str] = []

    @serve.deployment
    class Dying:
        async def __call__(self) -> str:
            attempts.append(serve.get_replica_context().replica_tag)
            if len(attempts) == 1:
                asyncio.get_running_loop().call_soon(exit_)
            await asyncio.sleep(0.01 if len(attempts) > 1 else 3600)
            return "survived"

    def exit_() -> None:
        raise SystemExit("the loop goes down with this")

    assert local(Dying.bind()).options(timeout_s=20).call() == "survived"
    first, second = attempts
    assert first != second
    assert "raised SystemExit: the loop goes down with this; it is started again" in caplog.text


def test_constructor_is_tried_once(local: Mode) -> None:
    tries: list[int] = []

    @serve.deployment
    class Counted:
        def __init__(self) -> None:
            tries.append(1)
            raise RuntimeError("never")

    with pytest.raises(DeployFailedError, match="its constructor raised RuntimeError: never"):
        local(Counted.bind())

    assert tries == [1]


def test_run_that_takes_too_long_says_what_it_waits_for(local: Mode) -> None:
    gate = threading.Event()

    @serve.deployment(graceful_shutdown_timeout_s=0)
    class Slow:
        def __init__(self) -> None:
            gate.wait(20)

    with pytest.raises(TimeoutError, match=r"did not come up within 0\.1 s: waiting for Slow"):
        serve.run(Slow.bind(), local=True, timeout_s=0.1)
    assert serve.status().applications["default"].deployments["Slow"].replica_states == {"STARTING": 1}
    gate.set()


def test_replica_whose_code_never_returns_is_left_behind(
    local: Mode, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_module, "GRACE_S", 0.1)
    monkeypatch.setattr(local_module, "CUT_S", 0.1)
    gate = threading.Event()

    @serve.deployment(graceful_shutdown_timeout_s=0)
    class Stuck:
        async def __call__(self) -> None:
            gate.wait(20)

    handle = local(Stuck.bind()).options(block_until="queued")
    ref = handle.remote()
    wait_for(lambda: serve.status().applications["default"].deployments["Stuck"].in_flight == 1)

    serve.delete("default")

    with pytest.raises(millstream.RequestCancelledError):
        ref.result(timeout=5)
    assert "user's code keeps its thread, which is left behind" in caplog.text
    gate.set()
    wait_for(lambda: not any("Stuck" in name for name in ours()), what="its thread to end after all")


# the end


def test_shutdown_ends_threads_and_server_and_all_can_begin_again(local: Mode) -> None:
    for _ in range(2):
        handle = local(Pipeline.bind(Adder.bind(1), Adder.options(num_replicas=2).bind(2)))
        assert handle.call(0) == 3
        assert any("default.Adder" in name for name in ours())
        assert runtime._tree is not None and runtime._tree._server is not None
        guard, folder = runtime._tree._server.guard.pid, runtime._tree._server.folder

        serve.shutdown()

        assert ours() == set()
        assert wait_for_end([guard], 0.0) == set()
        assert not folder.exists()


def test_shutdown_lets_running_requests_finish(local: Mode) -> None:
    entered, results = threading.Event(), []

    @serve.deployment
    class Slow:
        async def __call__(self) -> None:
            entered.set()
            await asyncio.sleep(0.1)
            results.append("finished")

    local(Slow.bind()).options(block_until="queued").remote()
    assert entered.wait(5)

    millstream.shutdown()

    assert results == ["finished"]


@timed
def test_shutdown_is_quick_when_the_server_has_gone(local: Mode) -> None:
    local(Model.options(num_replicas=2).bind())
    assert runtime._tree is not None and runtime._tree._server is not None
    guard = runtime._tree._server.guard
    for server in descendants(guard.pid):
        os.kill(server, signal.SIGKILL)
    guard.wait(10)

    started = time.monotonic()
    millstream.shutdown()

    assert time.monotonic() - started < 10
    assert ours() == set()


def test_other_threads_and_loops_can_serve_too(local: Mode) -> None:
    async def serve_and_call() -> int:
        await asyncio.to_thread(serve.run, double.bind(), local=True)
        value: int = await serve.get_app_handle().call(4)
        return value

    assert asyncio.run(serve_and_call()) == 8
