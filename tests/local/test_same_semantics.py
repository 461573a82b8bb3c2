"""Whatever is not about processes is the same in local mode as on real ones: each test runs in both."""

# mypy: disable-error-code="attr-defined"
# (mypy does not apply what a class decorator returns: https://github.com/python/mypy/issues/3135)

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import millstream
from millstream import ObjectRef, SyncHandle, serve
from millstream.errors import (
    DeployFailedError,
    DeploymentNotFoundError,
    GetTimeoutError,
    MillstreamError,
    RequestCancelledError,
    RequestTimeoutError,
    SerializationError,
    TaskError,
)
from tests.local.apps import (
    Adder,
    Blocking,
    Broken,
    Counting,
    Holding,
    Meeting,
    Model,
    Newer,
    Pipeline,
    double,
    failing,
    triple,
    values_of,
)
from tests.local.conftest import Mode
from tests.scenarios.processes import wait_for

pytestmark = pytest.mark.processes

# calls


@pytest.mark.parametrize("method", ["__call__", "suspending", "sync"])
def test_every_kind_of_method_answers(run: Mode, method: str) -> None:
    handle = run(Model.bind()).options(method_name=method)

    assert handle.call({"a": [1]}) == {"a": [1]}
    assert handle.remote("b").result(timeout=5) == "b"


def test_functions_are_deployments(run: Mode) -> None:
    assert run(double.bind(), name="one").call(21) == 42
    assert run(triple.bind(), name="two").call(5) == 15


def test_method_that_is_not_there_is_named_with_those_that_are(run: Mode) -> None:
    with pytest.raises(MillstreamError, match="no method 'predict'; available methods: __call__, append"):
        run(Model.bind()).predict.call(1)


def test_sync_methods_run_in_threads_of_the_replica(run: Mode) -> None:
    assert run(Model.bind()).thread.call().startswith("millstream-sync")


def test_arguments_and_results_are_copies(run: Mode) -> None:
    handle, values = run(Model.bind()), ["mine"]

    returned = handle.append.call(values)

    assert (values, returned) == (["mine"], ["mine", "appended"])


def test_constructor_arguments_are_copies_for_each_replica(run: Mode) -> None:
    shared: list[str] = []
    handle = run(Model.options(num_replicas=2).bind(shared))
    seen: dict[str, int] = {}

    def both_have_grown() -> bool:
        seen.update(millstream.get([handle.grow.options(block_until="queued").remote() for _ in range(20)]))
        return len(seen) == 2

    wait_for(both_have_grown, what="an answer of each replica")
    assert shared == []
    assert handle.strangers.call() == []


def test_map_gives_values_in_order_and_as_they_complete(run: Mode) -> None:
    handle = run(double.bind())

    assert list(handle.map(range(200))) == [2 * x for x in range(200)]
    assert sorted(handle.map(range(200), ordered=False, max_in_flight=10)) == [2 * x for x in range(200)]


def test_get_wait_and_put_follow_rays_rules(run: Mode) -> None:
    handle = run(Model.bind())
    refs = [handle.remote(x) for x in range(4)]

    assert millstream.get(refs) == [0, 1, 2, 3]
    ready, not_ready = millstream.wait(refs, num_returns=2, timeout=5)
    assert (len(ready), len(not_ready)) == (2, 2)
    assert handle.call(millstream.put("put")) == "put"
    assert ObjectRef.from_id(refs[3].id).result(timeout=5) == 3


def test_delayed_request_waits_for_its_time(run: Mode) -> None:
    handle = run(Model.bind())

    started = time.monotonic()
    ref = handle.options(delay_s=0.2).remote("later")

    with pytest.raises(GetTimeoutError):
        ref.result(timeout=0.05)
    assert ref.result(timeout=10) == "later"
    assert time.monotonic() - started >= 0.2


def test_asynchronous_handles_work_on_a_loop(run: Mode) -> None:
    run(Model.bind())

    async def calls() -> list[Any]:
        handle = serve.get_app_handle()
        ref = await handle.suspending.remote(2)
        return [await handle.call(1), await ref, [x async for x in handle.map([3, 4])]]

    assert asyncio.run(calls()) == [1, 2, [3, 4]]


# composition


def test_results_that_are_not_there_yet_are_arguments(run: Mode) -> None:
    handle = run(Pipeline.bind(Adder.bind(1), Adder.bind(10)))

    assert handle.call(100) == 111
    assert handle.blocking.call(100) == 111
    assert set(serve.status().applications["default"].deployments) == {"Pipeline", "Adder", "Adder_1"}


def test_node_bound_twice_is_one_deployment(run: Mode) -> None:
    shared = Adder.bind(2)

    assert run(Pipeline.bind(shared, shared)).call(0) == 4
    assert set(serve.status().applications["default"].deployments) == {"Pipeline", "Adder"}


def test_refs_become_values_at_the_top_level_only(run: Mode) -> None:
    handle = run(Model.bind())
    ref = handle.remote("a value")

    assert handle.kinds.call(ref, [ref], key=ref) == ["str", "list", "str"]
    (inner,) = handle.call([ref])
    assert inner == ref
    assert asyncio.run(values_of([inner])) == ["a value"]


def test_failure_upstream_is_that_of_its_dependant(run: Mode) -> None:
    handle = run(Model.bind())
    failed = handle.fails.remote("upstream")

    with pytest.raises(KeyError, match="upstream"):
        handle.call(failed)
    assert run(Pipeline.bind(failing.bind(), Adder.bind(1)), name="two").forgiving.call(1) == "TaskError(OSError)"


# errors


@pytest.mark.parametrize(("method", "kind"), [("fails", KeyError), ("fails_in_a_thread", ValueError)])
def test_error_is_of_two_kinds_and_brings_its_traceback(run: Mode, method: str, kind: type[Exception]) -> None:
    handle = run(Model.bind()).options(method_name=method)

    with pytest.raises(kind, match="no such thing") as caught:
        handle.call("no such thing")

    assert isinstance(caught.value, TaskError)
    assert f"in {method}" in str(caught.value.remote_traceback)


def test_error_that_cannot_be_pickled_arrives_as_text(run: Mode) -> None:
    with pytest.raises(TaskError, match="Unpicklable: too deep"):
        run(Model.bind()).fails_unpicklably.call("too deep")


def test_system_exit_of_a_request_ends_only_that(run: Mode) -> None:
    handle = run(Model.bind())
    before = handle.who.call()

    with pytest.raises(TaskError, match="SystemExit"):
        handle.leaves.call()

    assert handle.who.call() == before


def test_what_cannot_be_pickled_is_named(run: Mode) -> None:
    handle = run(Model.bind())

    with pytest.raises(SerializationError, match=r"\[0\]\['lock'\]"):
        handle.call({"lock": threading.Lock()})
    with pytest.raises(SerializationError, match=r"a result of default\.Model"):
        handle.returns_a_lock.call()
    with pytest.raises(SerializationError, match=r"the definition of other.Model\.args\[0\]"):
        run(Model.bind(threading.Lock()), name="other")
    assert set(serve.status().applications) == {"default"}


# configuration


def test_user_config_reaches_reconfigure(run: Mode) -> None:
    assert run(Model.options(user_config={"unit": "km"}).bind()).configured.call() == "km"


@pytest.mark.parametrize("method", ["pause", "pause_in_a_thread"])
def test_max_ongoing_requests_is_kept(run: Mode, method: str) -> None:
    handle = run(Counting.options(max_ongoing_requests=2, sync_threads=4).bind())

    pause = handle.options(method_name=method, block_until="queued")
    millstream.get([pause.remote() for _ in range(10)])

    assert handle.most.call() == 2


def test_sync_threads_run_at_the_same_time(run: Mode) -> None:
    handle = run(Meeting.options(max_ongoing_requests=2).bind()).options(block_until="queued")

    assert sorted(millstream.get([handle.remote(), handle.remote()], timeout=10)) == [0, 1]


def test_several_replicas_share_the_work(run: Mode) -> None:
    handle = run(Model.options(num_replicas=3).bind())
    seen: set[str] = set()

    def all_seen() -> bool:
        seen.update(millstream.get([handle.who.options(block_until="queued").remote() for _ in range(30)]))
        return len(seen) == 3

    wait_for(all_seen, what="an answer of each replica")
    replicas = serve.status().applications["default"].deployments["Model"].replicas
    assert len({replica.replica_id for replica in replicas}) == 3


def test_deployment_that_blocks_its_loop_holds_up_no_other(run: Mode, tmp_path: Path) -> None:
    blocking, other = run(Blocking.bind(), name="one"), run(Model.bind(), name="two")
    ref = blocking.options(block_until="queued").remote(str(tmp_path / "go"))
    wait_for(lambda: serve.status().applications["one"].deployments["Blocking"].in_flight == 1, what="it to begin")

    assert other.call("meanwhile") == "meanwhile"

    (tmp_path / "go").touch()
    assert ref.result(timeout=10) == "at last"


# streams, batches, cancelling


@pytest.mark.parametrize("method", ["count", "count_in_a_thread"])
def test_items_of_a_generator_come_as_a_stream(run: Mode, method: str) -> None:
    handle = run(Newer.bind()).options(method_name=method)

    assert list(handle.stream(200)) == list(range(200))


def test_calls_that_come_together_are_one_batch(run: Mode) -> None:
    handle = run(Newer.bind()).together.options(block_until="queued")

    assert [sorted(xs) for xs in millstream.get([handle.remote(n) for n in range(3)])] == [[0, 1, 2]] * 3


def test_code_knows_which_replica_it_runs_in(run: Mode) -> None:
    deployment, replica = run(Newer.bind()).where.call()

    (listed,) = serve.status().applications["default"].deployments["Newer"].replicas
    assert (deployment, replica) == ("Newer", listed.replica_id)


def test_cancelled_request_is_cancelled_where_it_runs(run: Mode) -> None:
    handle = run(Newer.bind())
    ref = handle.forever.remote()

    assert ref.cancel()

    with pytest.raises(RequestCancelledError):
        ref.result(timeout=5)
    assert handle.where.call()[0] == "Newer"


def test_thread_that_is_cancelled_does_not_hold_up_the_next_request_where_it_may_be_killed(
    run: Mode, tmp_path: Path
) -> None:
    handle = run(Newer.options(graceful_shutdown_timeout_s=0.2).bind())
    before = handle.where.call()
    ref = handle.forever_in_a_thread.options(kill_on_cancel=True).remote(str(tmp_path / "go"))

    # A replica has it, but no thread may yet: then its replica need not end.
    wait_for((tmp_path / "go.began").exists, what="its thread to begin")
    assert ref.cancel()

    # The order to end and the next request come by two connections, so that one more may still run here.
    wait_for(lambda: handle.where.options(timeout_s=10).call() != before, what="another replica")
    (tmp_path / "go").touch()


def test_request_that_takes_too_long_times_out(run: Mode) -> None:
    handle = run(Newer.bind())

    with pytest.raises(RequestTimeoutError):
        handle.forever.options(timeout_s=0.1).call()


# the life of an application


def test_status_says_what_runs(run: Mode) -> None:
    run(Model.options(num_replicas=2).bind())
    wait_for(lambda: serve.status().applications["default"].deployments["Model"].status == "HEALTHY")

    app = serve.status().applications["default"]

    assert app.status == "RUNNING"
    assert app.deployments["Model"].replica_states == {"RUNNING": 2}
    assert app.deployments["Model"].target_replicas == 2


def until_replaced(deployment: str) -> None:
    """Processes of the version before may answer for a moment. In local mode they do not: see test_local_mode.py."""
    wait_for(lambda: serve.status().applications["default"].deployments[deployment].status == "HEALTHY")


def test_running_again_replaces_what_runs(run: Mode) -> None:
    run(Adder.bind(1))

    handle = run(Adder.bind(5))
    until_replaced("Adder")

    assert {handle.call(1) for _ in range(20)} == {6}
    assert len(serve.status().applications["default"].deployments["Adder"].replicas) == 1


def test_no_request_fails_while_an_application_is_replaced(run: Mode) -> None:
    handle = run(Adder.options(num_replicas=2).bind(0)).options(block_until="queued")
    refs = [handle.remote(n) for n in range(300)]

    run(Adder.options(num_replicas=2).bind(0))
    refs += [handle.remote(n) for n in range(300)]

    assert millstream.get(refs, timeout=20) == [*range(300), *range(300)]


def test_what_an_application_has_no_more_is_gone(run: Mode) -> None:
    run(Pipeline.bind(Adder.bind(1), Adder.bind(2)))

    handle = run(Adder.bind(3))
    until_replaced("Adder")

    assert handle.call(0) == 3
    assert set(serve.status().applications["default"].deployments) == {"Adder"}
    wait_for(lambda: is_gone(serve.get_deployment_handle("Pipeline", sync=True)), what="the end of Pipeline")


def is_gone(handle: SyncHandle) -> bool:
    """Its requests are taken until nobody is left that could send one."""
    try:
        handle.call(0)
    except DeploymentNotFoundError:
        return True
    except (MillstreamError, TypeError):
        return False
    return False


def test_what_runs_when_it_is_deleted_finishes(run: Mode) -> None:
    handle = run(Holding.bind())
    ref = handle.hold.remote("held")
    handle.entered.call()

    deleting = threading.Thread(target=serve.delete, args=["default"])
    handle.let_go_soon.remote()
    deleting.start()
    deleting.join(10)

    assert ref.result(timeout=5) == "held"
    assert serve.status().applications == {}


def test_what_waits_when_it_is_deleted_is_cancelled(run: Mode) -> None:
    handle = run(Holding.options(max_ongoing_requests=1, graceful_shutdown_timeout_s=0.2).bind())
    running = handle.options(method_name="hold").remote("running")
    waiting = handle.options(method_name="hold", block_until="queued").remote("waiting")

    serve.delete("default")

    for ref in (running, waiting):
        with pytest.raises(RequestCancelledError):
            ref.result(timeout=10)


def test_deleted_application_is_not_found(run: Mode) -> None:
    handle = run(Model.bind())

    serve.delete("default")

    with pytest.raises(DeploymentNotFoundError):
        handle.call(1)
    with pytest.raises(DeploymentNotFoundError):
        serve.get_app_handle()
    serve.delete("default")  # no error


def test_constructor_that_raises_is_told_with_its_traceback(run: Mode) -> None:
    with pytest.raises(DeployFailedError, match="no model at this path") as caught:
        run(Pipeline.bind(Adder.bind(1), Broken.bind("no model at this path")))

    assert "raise RuntimeError(message)" in caught.value.remote_traceback
    app = serve.status().applications["default"]
    assert (app.status, app.deployments["Broken"].status) == ("DEPLOY_FAILED", "DEPLOY_FAILED")
    with pytest.raises(DeployFailedError, match="no model"):
        serve.get_deployment_handle("Broken", sync=True).call()


def test_mended_application_can_be_deployed_after_a_failure(run: Mode) -> None:
    with pytest.raises(DeployFailedError):
        run(Broken.bind("gone"))

    assert run(Adder.bind(1)).call(1) == 2


def test_two_applications_live_side_by_side(run: Mode) -> None:
    one, two = run(Adder.bind(1), name="one"), run(Adder.bind(2), name="two")

    assert (one.call(0), two.call(0)) == (1, 2)
    serve.delete("one")
    assert two.call(0) == 2
