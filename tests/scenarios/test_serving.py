"""serve.run and what it owns: real processes, a real server, through the public API only."""

import asyncio
import os
import threading
import time

import pytest

import millstream
from millstream import serve
from millstream.errors import (
    ConfigError,
    DeployFailedError,
    DeploymentNotFoundError,
    SerializationError,
)
from tests.scenarios.apps import Adder, Broken, Dying, Pipeline, Worker
from tests.scenarios.processes import wait_for
from tests.timing import timed

pytestmark = pytest.mark.processes


def test_an_application_answers() -> None:
    handle = serve.run(Worker.bind())

    assert handle.echo.call({"a": [1]}) == {"a": [1]}
    assert millstream.get(handle.echo.remote("b")) == "b"
    assert handle.pid.call() != os.getpid()


@pytest.mark.on_cluster
def test_composed_deployments_pass_tasks_without_awaiting_them() -> None:
    handle = serve.run(Pipeline.bind(Adder.bind(1), Adder.bind(10)))

    assert handle.call(100) == 111
    assert set(serve.status().applications["default"].deployments) == {"Pipeline", "Adder", "Adder_1"}


def test_the_same_node_bound_twice_is_one_deployment() -> None:
    shared = Adder.bind(2)

    handle = serve.run(Pipeline.bind(shared, shared))

    assert handle.call(0) == 4
    assert set(serve.status().applications["default"].deployments) == {"Pipeline", "Adder"}


def test_functions_are_deployments() -> None:
    @serve.deployment
    def double(x: int) -> int:
        return 2 * x

    assert serve.run(double.bind()).call(21) == 42


def test_running_again_replaces_the_application() -> None:
    serve.run(Adder.bind(1))

    handle = serve.run(Adder.bind(5))

    wait_for(lambda: handle.call(1) == 6, what="the new version")
    assert [handle.call(n) for n in range(20)] == [n + 5 for n in range(20)]


@pytest.mark.on_cluster
def test_no_request_fails_while_an_application_is_replaced() -> None:
    handle = serve.run(Adder.options(num_replicas=2).bind(0))
    in_flight = [handle.options(block_until="queued").remote(n) for n in range(300)]

    serve.run(Adder.options(num_replicas=2).bind(0))
    in_flight += [handle.options(block_until="queued").remote(n) for n in range(300)]

    assert millstream.get(in_flight, timeout=20) == [*range(300), *range(300)]


def test_two_applications_live_side_by_side() -> None:
    one = serve.run(Adder.bind(1), name="one")
    two = serve.run(Adder.bind(2), name="two")

    assert (one.call(0), two.call(0)) == (1, 2)
    serve.delete("one")
    assert two.call(0) == 2
    with pytest.raises(DeploymentNotFoundError, match="one"):
        one.call(0)


def test_a_constructor_that_raises_ends_in_deploy_failed_with_its_traceback() -> None:
    with pytest.raises(DeployFailedError, match="no model at this path") as caught:
        serve.run(Broken.bind("no model at this path"))

    assert "raise RuntimeError(message)" in caught.value.remote_traceback
    assert serve.status().applications["default"].status == "DEPLOY_FAILED"


def test_a_constructor_that_kills_its_process_ends_in_deploy_failed() -> None:
    with pytest.raises(DeployFailedError, match="SIGABRT"):
        serve.run(Dying.bind())


def test_a_call_to_what_cannot_start_is_told_so() -> None:
    with pytest.raises(DeployFailedError):
        serve.run(Broken.bind("gone"))

    handle = serve.get_deployment_handle("Broken", sync=True)
    with pytest.raises(DeployFailedError, match="gone"):
        handle.call()
    with pytest.raises(DeployFailedError, match="gone"):
        handle.remote()


def test_a_mended_application_can_be_deployed_after_a_failure() -> None:
    with pytest.raises(DeployFailedError):
        serve.run(Broken.bind("gone"))

    assert serve.run(Adder.bind(1)).call(1) == 2


def test_an_unpicklable_constructor_argument_is_named() -> None:
    with pytest.raises(SerializationError, match="args"):
        serve.run(Adder.bind(threading.Lock()))  # type: ignore[arg-type]


def test_bad_arguments_are_refused_before_anything_starts() -> None:
    with pytest.raises(TypeError, match=r"\.bind\(\)"):
        serve.run(Adder)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="application name"):
        serve.run(Adder.bind(1), name="no spaces please")
    with pytest.raises(ConfigError, match="num_replicas=-1"):
        Adder.options(num_replicas=-1)
    assert not millstream.is_initialized()


@pytest.mark.on_cluster
def test_delete_lets_running_requests_finish(tmp_path, ledger) -> None:  # type: ignore[no-untyped-def]
    handle = serve.run(Worker.bind(str(ledger)))
    ref = handle.hold.remote("a", str(tmp_path / "go"))
    (tmp_path / "go").touch()

    serve.delete("default")

    assert millstream.get(ref, timeout=5)[0] == "a"
    assert serve.status().applications == {}


def test_handles_of_a_script_work_on_an_event_loop_too() -> None:
    serve.run(Worker.bind())

    async def calls() -> list[object]:
        handle = serve.get_app_handle()
        return [
            await handle.echo.call(1),
            await (await handle.echo.remote(2)),
            [v async for v in handle.echo.map([3, 4])],
        ]

    assert asyncio.run(calls()) == [1, 2, [3, 4]]


def test_status_lists_replicas_with_pid_and_node() -> None:
    handle = serve.run(Worker.options(num_replicas=2).bind())
    wait_for(lambda: serve.status().applications["default"].deployments["Worker"].status == "HEALTHY")

    deployment = serve.status().applications["default"].deployments["Worker"]

    assert deployment.replica_states == {"RUNNING": 2}
    assert handle.pid.call() in {replica.pid for replica in deployment.replicas}


def test_output_of_replicas_appears_with_a_prefix(capfd: pytest.CaptureFixture[str]) -> None:
    handle = serve.run(Worker.bind())

    handle.speak.call("a line from inside")

    def seen() -> bool:
        out, err = capfd.readouterr()
        lines.extend([*out.splitlines(), *err.splitlines()])
        return any("A LINE FROM INSIDE" in line for line in lines) and any("a line from" in line for line in lines)

    lines: list[str] = []
    wait_for(seen, what="both lines")
    assert any(line.startswith("[default.Worker r-") and line.endswith("a line from inside") for line in lines)


@pytest.mark.on_cluster
def test_it_scales_from_zero_to_several_and_back(tmp_path, ledger) -> None:  # type: ignore[no-untyped-def]
    scaling = {
        "min_replicas": 0,
        "max_replicas": 3,
        "target_ongoing_requests": 1,
        "downscale_delay_s": 0.5,
    }
    handle = serve.run(Worker.options(autoscaling_config=scaling, max_ongoing_requests=1).bind(str(ledger)))

    def replicas() -> int:
        return serve.status().applications["default"].deployments["Worker"].replica_states.get("RUNNING", 0)

    assert replicas() == 0
    go = str(tmp_path / "go")
    refs = [handle.options(method_name="hold", block_until="queued").remote(str(n), go) for n in range(12)]
    wait_for(lambda: replicas() == 3, 15, "three replicas")
    (tmp_path / "go").touch()
    assert sorted(name for name, _ in millstream.get(refs, timeout=15)) == sorted(str(n) for n in range(12))
    wait_for(lambda: replicas() == 0, 15, "zero replicas")


@timed
def test_the_first_request_from_zero_is_answered_within_a_second() -> None:
    handle = serve.run(Worker.options(autoscaling_config={"min_replicas": 0, "max_replicas": 1}).bind())

    started = time.monotonic()
    assert handle.echo.call(1) == 1

    assert time.monotonic() - started < 1.0


def test_an_operator_sets_the_number_of_replicas() -> None:
    from millstream.runtime import with_registry

    serve.run(Worker.bind())

    with_registry(lambda registry: registry.override("default.Worker", {"num_replicas": 3}))

    def running() -> int:
        return serve.status().applications["default"].deployments["Worker"].replica_states.get("RUNNING", 0)

    wait_for(lambda: running() == 3, what="three replicas")
    with_registry(lambda registry: registry.override("default.Worker", None))
    wait_for(lambda: running() == 1, what="one replica")
