"""Handles on real replicas: what they send and when they return; and what they are apart from that, plain values."""

import asyncio
import copy
import os
import pickle
import signal
import threading
import time
from typing import Any

import anyio
import anyio.to_thread
import pytest

from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys
from millstream.config import Settings
from millstream.errors import (
    BrokerUnavailableError,
    ConfigError,
    DeployFailedError,
    DeploymentNotFoundError,
    SerializationError,
)
from millstream.handles import engines
from millstream.handles.handle import DeploymentHandle, SyncHandle
from tests.helpers import read_states, wait_until
from tests.replica_helpers import Gate, Serving
from tests.servers import free_port
from tests.timing import timed

HANDLES = [DeploymentHandle("Model", "app"), SyncHandle("Model", "app")]


class Model:
    """One method of each kind."""

    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate or Gate()
        self.seen: list[Any] = []

    async def __call__(self, x: Any = None) -> Any:
        await self._gate.wait()
        return x

    async def prompt(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    def in_thread(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    async def blob(self, size: int) -> bytes:
        return b"x" * size


async def double(x: int) -> int:
    return 2 * x


def triple(x: int) -> int:
    return 3 * x


# handles as values


@pytest.mark.parametrize("handle", HANDLES)
def test_handle_pickles_as_names_and_options(handle: Any) -> None:
    engines.use(Settings("redis://:hunter2@127.0.0.1:1", secret_key=b"sesame"))
    handle = handle.predict.options(block_until="queued")

    pickled = pickle.dumps(handle)

    assert pickle.loads(pickled) == handle
    assert not [word for word in (b"hunter2", b"sesame", b"127.0.0.1", b"redis") if word in pickled]
    engines.close_all()


@pytest.mark.parametrize("handle", HANDLES)
def test_copy_of_a_handle_is_of_its_kind_and_equal(handle: Any) -> None:
    for again in (copy.copy(handle), copy.deepcopy(handle), pickle.loads(pickle.dumps(handle))):
        assert type(again) is type(handle)
        assert again == handle and hash(again) == hash(handle)


def test_handles_of_different_kinds_methods_or_deployments_differ() -> None:
    handle = DeploymentHandle("Model", "app")

    assert len({handle, SyncHandle("Model", "app"), handle.predict, DeploymentHandle("Model", "other")}) == 4
    assert handle != "Model"


@pytest.mark.parametrize("handle", HANDLES)
def test_attribute_is_a_handle_of_that_method(handle: Any) -> None:
    assert handle.predict == handle.options(method_name="predict")
    assert handle.predict.again == handle.again
    assert handle.predict is handle.predict
    assert type(handle.predict) is type(handle)


@pytest.mark.parametrize("name", ["__len__", "__iter__", "__fspath__", "_repr_html_", "_ipython_display_"])
@pytest.mark.parametrize("handle", HANDLES)
def test_name_with_an_underscore_is_no_method(handle: Any, name: str) -> None:
    assert not hasattr(handle, name)
    with pytest.raises(AttributeError, match="use options\\(method_name=\\)"):
        getattr(handle, name)


@pytest.mark.parametrize("handle", HANDLES)
def test_options_change_what_they_name_only(handle: Any) -> None:
    changed = handle.options(method_name="predict", delay_s=2).options(block_until="queued")

    assert changed == handle.options(method_name="predict", delay_s=2, block_until="queued")
    assert handle == HANDLES[HANDLES.index(handle)]


@pytest.mark.parametrize("handle", HANDLES)
def test_unknown_option_is_refused_with_those_that_are_known(handle: Any) -> None:
    with pytest.raises(TypeError, match="unknown option 'retries'; known are method_name, block_until, stream"):
        handle.options(retries=3)
    with pytest.raises(TypeError):
        handle.options("predict")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method_name", ""), ("method_name", 3), ("method_name", "é" * 128), ("block_until", "done"),
        ("delay_s", -1), ("delay_s", "1"), ("delay_s", float("nan")), ("delay_s", float("inf")), ("delay_s", None),
    ],
)  # fmt: skip
def test_option_with_an_impossible_value_is_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        DeploymentHandle("Model").options(**{name: value})

    assert f"{name}={value!r}" in str(caught.value)


def test_repr_names_deployment_application_and_method() -> None:
    assert repr(SyncHandle("Model", "app")) == "SyncHandle('Model', app_name='app')"
    assert repr(DeploymentHandle("Model").predict) == (
        "DeploymentHandle('Model', app_name='default', method_name='predict')"
    )


@pytest.mark.parametrize("handle", HANDLES)
def test_handle_that_is_called_itself_says_what_to_write(handle: Any) -> None:
    with pytest.raises(TypeError, match=r"write Model\.remote\(\.\.\.\) or \.call\(\.\.\.\)"):
        handle(1)


@pytest.mark.parametrize("how", ["remote", "call"])
def test_asynchronous_handle_without_a_loop_says_what_to_use_instead(how: str) -> None:
    with pytest.raises(RuntimeError, match=r"no asyncio event loop runs in this thread.*SyncHandle"):
        getattr(DeploymentHandle("Model"), how)(1)


# calling


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["prompt", "in_thread"])
async def test_arguments_arrive_as_they_were_passed(serving: Serving, method: str) -> None:
    handle = serving(Model).options(method_name=method)

    assert await handle.call() == ((), {})
    assert await handle.call(1, [2], x={"y": None}) == ((1, [2]), {"x": {"y": None}})
    assert await (await handle.remote(1, x=2)) == ((1,), {"x": 2})


def test_blocking_handle_passes_arguments_on_just_so(serving: Serving) -> None:
    handle = serving.sync(Model)

    assert handle.prompt.call(1, [2], x=3) == ((1, [2]), {"x": 3})
    assert handle.in_thread.remote(1).result() == ((1,), {})


@pytest.mark.anyio
async def test_function_is_called_by_its_handle(serving: Serving) -> None:
    assert await serving(double).call(4) == 8
    assert await serving(triple).call(4) == 12


@pytest.mark.anyio
async def test_task_and_ref_can_be_awaited_again_and_again(serving: Serving) -> None:
    task = serving(Model).prompt.remote(1)

    refs = [await task, await task]

    assert refs[0] is refs[1]
    assert [await refs[0], await refs[0]] == [((1,), {})] * 2


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"])
async def test_request_is_sent_without_anybody_awaiting_it(serving: Serving) -> None:
    gate = Gate()
    handle = serving(Model, gate)
    await handle.prompt.call()

    task, future = handle.remote(1), handle.call(2)

    await anyio.to_thread.run_sync(lambda: _wait_for(lambda: gate.inside == 2))
    gate.open()
    assert (await (await task), await future) == (1, 2)


def _wait_for(condition: Any) -> None:
    while not condition():
        time.sleep(0.001)


@pytest.mark.anyio
async def test_thousands_of_requests_at_once_each_get_their_own_result(serving: Serving) -> None:
    handle = serving(Model, replicas=2)

    values = await asyncio.gather(*[handle.prompt.call(x) for x in range(2000)])

    assert values == [((x,), {}) for x in range(2000)]


@pytest.mark.anyio
@pytest.mark.parametrize("size", [0, 3000, 4096, 5000, 70_000, 3_000_000])
async def test_result_of_any_size_arrives(serving: Serving, size: int) -> None:
    handle = serving(Model)

    assert await handle.blob.call(size) == b"x" * size
    assert (await handle.prompt.call(b"y" * size))[0] == (b"y" * size,)


@pytest.mark.anyio
async def test_handle_goes_along_as_an_argument_and_calls_from_there(serving: Serving) -> None:
    inner = serving(double)

    async def outer(handle: DeploymentHandle, x: int) -> int:
        value: int = await handle.call(x)
        return value + 1

    assert await serving(outer).call(inner, 4) == 9


def test_blocking_handle_serves_many_threads_at_once(serving: Serving) -> None:
    handle, values = serving.sync(Model), {}

    def call(x: int) -> None:
        values[x] = [handle.prompt.call(x)[0][0], handle.in_thread.remote(x).result()[0][0]]

    threads = [threading.Thread(target=call, args=[x]) for x in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert values == {x: [x, x] for x in range(20)}


# matched


@pytest.mark.anyio
async def test_remote_returns_when_the_request_runs_and_before_it_ends(serving: Serving) -> None:
    gate = Gate()
    handle = serving(Model, gate)

    ref = await handle.remote(1)

    await wait_until(lambda: gate.inside == 1)
    assert not ref.done()
    gate.open()
    assert await ref == 1


def test_blocking_remote_returns_when_the_request_runs_and_before_it_ends(serving: Serving) -> None:
    gate = Gate()

    ref = serving.sync(Model, gate).remote(1)

    assert not ref.done()
    gate.open()
    assert ref.result() == 1


@pytest.mark.anyio
async def test_remote_waits_for_a_free_slot(serving: Serving) -> None:
    gate = Gate()
    handle = serving(Model, gate, max_ongoing_requests=1)
    first = await handle.remote(1)

    second = handle.remote(2)

    with anyio.move_on_after(0.1) as patience:
        await asyncio.shield(second)
    assert patience.cancelled_caught
    gate.open()
    assert [await first, await (await second)] == [1, 2]


@pytest.mark.anyio
async def test_remote_waits_for_a_replica(serving: Serving) -> None:
    handle = serving.deploy_only(Model)
    task = handle.prompt.remote(1)
    with anyio.move_on_after(0.1) as patience:
        await asyncio.shield(task)
    assert patience.cancelled_caught

    serving.start_replica(handle, Model)

    assert await (await task) == ((1,), {})


@pytest.mark.anyio
async def test_remote_until_queued_returns_without_a_replica_once_the_server_has_the_request(
    serving: Serving, redis: Control, keys: DeploymentKeys
) -> None:
    handle = serving.deploy_only(Model).options(block_until="queued")

    ref = await handle.remote(1)

    assert await read_states(redis, keys, [ref.id.partition("~")[2]]) == ["queued"]


@pytest.mark.anyio
async def test_blocking_remote_until_queued_returns_once_the_server_has_the_request(
    serving: Serving, redis: Control, keys: DeploymentKeys
) -> None:
    handle = serving.deploy_only(Model).options(block_until="queued")

    ref = await anyio.to_thread.run_sync(SyncHandle("Model", "app", handle._options).remote)

    assert await read_states(redis, keys, [ref.id.partition("~")[2]]) == ["queued"]


@pytest.mark.anyio
async def test_remote_until_queued_reports_an_unknown_deployment(connected: Settings) -> None:
    with pytest.raises(DeploymentNotFoundError):
        await DeploymentHandle("Nobody", "app").options(block_until="queued").remote(1)


@pytest.mark.anyio
@timed
async def test_delayed_request_is_matched_at_once_and_runs_when_it_is_due(serving: Serving) -> None:
    handle = serving(Model).prompt.options(delay_s=0.3)
    start = time.monotonic()

    ref = await handle.remote(1)
    matched_s = time.monotonic() - start
    value = await ref

    assert value == ((1,), {})
    assert matched_s < 0.3 <= time.monotonic() - start


@pytest.mark.anyio
async def test_cancelling_a_call_does_not_cancel_the_request(serving: Serving) -> None:
    gate = Gate()
    handle = serving(Model, gate)
    future = handle.call(1)
    await wait_until(lambda: gate.inside == 1)

    future.cancel()
    gate.open()

    await wait_until(lambda: gate.passed == 1)
    assert future.cancelled()


@pytest.mark.parametrize("replicas", [0, 1])
def test_blocking_calls_can_be_interrupted(serving: Serving, replicas: int) -> None:
    class Interrupt(BaseException):
        pass

    def interrupt(*_: Any) -> None:
        raise Interrupt

    gate = Gate()
    handle = serving.sync(Model, gate, replicas=replicas)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        for wait in (handle.remote if not replicas else handle.call, handle.call):
            timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            with pytest.raises(Interrupt):
                wait(1)
            timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
        gate.open()


# what cannot be sent


@pytest.mark.anyio
async def test_unknown_deployment_is_reported_by_name(connected: Settings) -> None:
    handle = DeploymentHandle("Nobody", "app")

    with pytest.raises(DeploymentNotFoundError, match="no deployment 'Nobody' in application 'app'"):
        await handle.call(1)
    with pytest.raises(DeploymentNotFoundError):
        await handle.remote(1)
    with pytest.raises(DeploymentNotFoundError):
        await handle.options(delay_s=1).remote(1)


def test_unknown_deployment_is_reported_to_blocking_callers(connected: Settings) -> None:
    handle = SyncHandle("Nobody", "app")

    with pytest.raises(DeploymentNotFoundError, match="'Nobody'"):
        handle.call(1)
    with pytest.raises(DeploymentNotFoundError, match="'Nobody'") as caught:
        handle.remote(1)
    assert vars(caught.value) == {"app": "app", "deployment": "Nobody"}


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["call", "remote"])
async def test_argument_that_cannot_be_pickled_is_named_at_once(connected: Settings, how: str) -> None:
    lock = threading.Lock()

    with pytest.raises(SerializationError, match=r"thread.lock") as caught:
        getattr(DeploymentHandle("Model", "app").predict, how)(1, {"a": [lock]})

    assert "app.Model.predict" in str(caught.value)
    assert caught.value.path.endswith("[0][1]['a'][0]")


@pytest.mark.parametrize("how", ["call", "remote"])
@timed
def test_unreachable_server_is_reported_quickly(how: str) -> None:
    engines.use(Settings(f"redis://:hunter2@127.0.0.1:{free_port()}"))
    try:
        start = time.monotonic()
        with pytest.raises(BrokerUnavailableError) as caught:
            getattr(SyncHandle("Model"), how)(1)
        assert time.monotonic() - start < 2
        assert "127.0.0.1" in str(caught.value) and "hunter2" not in str(caught.value)
    finally:
        engines.close_all()


@pytest.mark.anyio
async def test_deployment_that_cannot_start_fails_its_callers(
    serving: Serving, redis: Control, keys: DeploymentKeys
) -> None:
    task = serving.deploy_only(Model).remote(1)
    status: dict[Any, Any] = {"state": "DEPLOY_FAILED", "message": "no GPU", "traceback": "Traceback: here"}

    await redis.hset(keys.status, mapping=status)

    with pytest.raises(DeployFailedError, match=r"app.Model cannot start: no GPU") as caught:
        await task
    assert caught.value.remote_traceback == "Traceback: here"


@pytest.mark.anyio
async def test_failed_update_of_a_deployment_that_still_serves_fails_nobody(
    serving: Serving, redis: Control, keys: DeploymentKeys
) -> None:
    gate = Gate()
    handle = serving(Model, gate, max_ongoing_requests=1)
    running, queued = handle.call(1), handle.call(2)

    await redis.hset(keys.status, mapping={"state": "DEPLOY_FAILED", "message": "no GPU"})
    with anyio.move_on_after(1.2):  # the engine asks every LOOK_EVERY_S
        await asyncio.wait([running, queued])
    gate.open()

    assert [await running, await queued] == [1, 2]
