"""What a caller catches when a request fails, from the method on the replica to the line that waits for it."""

import asyncio
import errno
import threading
from collections.abc import Iterator
from typing import Any

import anyio.to_thread
import pytest

from millstream.config import Settings
from millstream.errors import MillstreamError, SerializationError, SignatureError, TaskError
from millstream.handles import engines
from millstream.handles.handle import DeploymentHandle
from tests.replica_helpers import Serving


class UsersError(Exception):
    def __init__(self, code: int, detail: str) -> None:
        super().__init__(code, detail)
        self.code, self.detail = code, detail


class HoldsLock(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class CannotBeLoaded(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class Untold(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class Model:
    """Fails in every way a method can."""

    async def raise_promptly(self, error: BaseException) -> None:
        raise error

    async def raise_later(self, error: BaseException) -> None:
        await asyncio.sleep(0)
        raise error

    def raise_in_thread(self, error: BaseException) -> None:
        raise error

    async def chain(self) -> None:
        try:
            dict[str, int]()["missing"]
        except KeyError as e:
            raise UsersError(7, "no such thing") from e

    async def raise_what_cannot_travel(self, which: str) -> None:
        raise {"pickled": HoldsLock("held"), "loaded": CannotBeLoaded("a", "b"), "printed": Untold()}[which]

    async def return_a_lock(self) -> Any:
        return {"a": [threading.Lock()]}

    def generate(self) -> Iterator[int]:
        yield 1

    async def same(self, x: Any) -> Any:
        return x

    @property
    def broken(self) -> int:
        raise RuntimeError("not loaded yet")

    def _helper(self) -> int:
        return 1

    constant = 3


# the user's error


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["raise_promptly", "raise_later", "raise_in_thread"])
async def test_error_is_caught_as_its_own_class_and_as_a_task_error(serving: Serving, method: str) -> None:
    handle = serving(Model).options(method_name=method)
    error = UsersError(7, "no such thing")

    for waiting in (handle.call(error), await handle.remote(error)):
        with pytest.raises(UsersError) as caught:
            await waiting
        assert isinstance(caught.value, TaskError) and isinstance(caught.value, MillstreamError)
        assert (caught.value.code, caught.value.detail) == (7, "no such thing")
        assert isinstance(caught.value.cause, UsersError) and caught.value.cause.args == (7, "no such thing")
        assert caught.value.ref_id.startswith("app.Model~")


def test_blocking_callers_catch_the_same(serving: Serving) -> None:
    handle = serving.sync(Model).raise_in_thread

    def by_ref(error: Exception) -> Any:
        return handle.remote(error).result()

    for wait in (handle.call, by_ref):
        with pytest.raises(UsersError) as caught:
            wait(UsersError(7, "no such thing"))
        assert isinstance(caught.value, TaskError)


@pytest.mark.anyio
async def test_text_of_an_error_is_the_users_traceback_with_request_and_replica(serving: Serving) -> None:
    with pytest.raises(UsersError) as caught:
        await serving(Model).chain.call()

    text = str(caught.value)
    assert caught.value.ref_id in text and "replica r-" in text and "pid" in text  # type: ignore[attr-defined]
    assert '()["missing"]' in text and "KeyError: 'missing'" in text
    assert "direct cause of the following exception" in text
    assert "millstream/replicas" not in text


@pytest.mark.anyio
async def test_ref_raises_its_error_as_often_as_it_is_asked(serving: Serving) -> None:
    ref = await serving(Model).chain.remote()

    texts = set()
    for _ in range(3):
        with pytest.raises(UsersError) as caught:
            await ref
        texts.add(str(caught.value))

    assert len(texts) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["raise_promptly", "raise_later", "raise_in_thread"])
async def test_builtin_errors_keep_what_they_hold(serving: Serving, method: str) -> None:
    handle = serving(Model).options(method_name=method)

    with pytest.raises(KeyError) as key_error:
        await handle.call(KeyError("x"))
    with pytest.raises(FileNotFoundError) as not_found:
        await handle.call(OSError(errno.ENOENT, "gone", "a.txt"))
    with pytest.raises(TimeoutError):
        await handle.call(TimeoutError())

    assert key_error.value.cause.args == ("x",)  # type: ignore[attr-defined]
    assert (not_found.value.errno, not_found.value.filename) == (errno.ENOENT, "a.txt")


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["raise_promptly", "raise_later", "raise_in_thread"])
@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), StopAsyncIteration(1)]
)
async def test_what_would_stop_a_process_or_a_loop_fails_the_request_only(
    serving: Serving, method: str, error: BaseException
) -> None:
    handle = serving(Model)

    ref = await handle.options(method_name=method).remote(error)

    with pytest.raises(TaskError) as caught:
        await asyncio.wait_for(ref, 5)
    assert not isinstance(caught.value, type(error)), "it would stop the caller"
    assert caught.value.cause_type.endswith(type(error).__name__)
    assert await handle.same.call(1) == 1


@pytest.mark.anyio
async def test_stop_iteration_arrives_as_a_task_error(serving: Serving) -> None:
    handle = serving(Model)

    for waiting in (
        handle.raise_in_thread.call(StopIteration(1)),
        await handle.raise_in_thread.remote(StopIteration(1)),
    ):
        with pytest.raises(TaskError) as caught:
            await waiting
        assert caught.value.cause_type == "StopIteration"
    with pytest.raises(RuntimeError, match="coroutine raised StopIteration"):  # Python's own rule
        await handle.raise_promptly.call(StopIteration(1))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("which", "name"), [("pickled", "HoldsLock"), ("loaded", "CannotBeLoaded"), ("printed", "Untold")]
)
async def test_error_that_cannot_travel_arrives_as_a_task_error_that_names_it(
    serving: Serving, which: str, name: str
) -> None:
    with pytest.raises(TaskError) as caught:
        await serving(Model).raise_what_cannot_travel.call(which)

    assert caught.value.cause_type.endswith(name)
    assert name in str(caught.value) and "raise_what_cannot_travel" in str(caught.value)


@pytest.mark.anyio
async def test_error_passes_through_the_deployments_in_between(serving: Serving) -> None:
    inner = serving(Model)

    async def outer(handle: DeploymentHandle) -> None:
        await handle.chain.call()

    with pytest.raises(UsersError) as caught:
        await serving(outer).call(inner)

    assert caught.value.ref_id.startswith("app")  # type: ignore[attr-defined]
    assert caught.value.code == 7 and '()["missing"]' in str(caught.value)


# methods, arguments and results that are not there, do not fit, or cannot travel


@pytest.mark.anyio
async def test_missing_method_is_named_with_those_there_are(serving: Serving) -> None:
    with pytest.raises(MillstreamError, match=r"app\.Model has no method 'predict'; available methods: ") as caught:
        await serving(Model).predict.call()

    listed = str(caught.value).rpartition(": ")[2].split(", ")
    assert {"chain", "generate", "raise_later"} <= set(listed)
    assert not {"broken", "constant", "__init__"} & set(listed)
    assert vars(caught.value)["method"] == "predict"


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["__init__", "__class__", "constant", "__call__"])
async def test_what_is_no_method_of_the_user_cannot_be_called(serving: Serving, method: str) -> None:
    with pytest.raises(MillstreamError, match=f"has no method '{method}'"):
        await serving(Model).options(method_name=method).call()


@pytest.mark.anyio
async def test_property_that_raises_fails_its_own_request_only(serving: Serving) -> None:
    handle = serving(Model)

    with pytest.raises(RuntimeError, match="not loaded yet"):
        await handle.broken.call()
    assert await handle.same.call(1) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["raise_promptly", "raise_later", "raise_in_thread"])
async def test_arguments_that_do_not_fit_are_a_type_error(serving: Serving, method: str) -> None:
    with pytest.raises(TypeError, match=f"{method}.. takes 2 positional arguments") as caught:
        await serving(Model).options(method_name=method).call(1, 2, 3)
    assert isinstance(caught.value, TaskError)


@pytest.mark.anyio
async def test_result_that_cannot_be_pickled_is_named(serving: Serving) -> None:
    handle = serving(Model)

    with pytest.raises(SerializationError, match=r"a result of app\.Model\['a'\]\[0\] cannot be pickled: lock object"):
        await handle.return_a_lock.call()
    with pytest.raises(TypeError, match=r"is a generator; call it with handle.stream"):
        await handle.generate.call()


# signatures


class Bomb:
    """Notes that it was unpickled."""

    exploded: list[str] = []  # noqa: RUF012

    def __setstate__(self, state: Any) -> None:
        self.exploded.append(threading.current_thread().name)

    def __getstate__(self) -> Any:
        return {"armed": True}


@pytest.mark.anyio
async def test_request_signed_with_another_secret_is_not_opened(serving: Serving, connected: Settings) -> None:
    Bomb.exploded.clear()
    handle = serving(Model)
    engines.use(Settings(connected.url, secret_key=b"another secret"))

    with pytest.raises(SignatureError, match="MILLSTREAM_SECRET_KEY"):
        await handle.same.call(Bomb())

    assert Bomb.exploded == []


@pytest.mark.anyio
async def test_result_signed_with_another_secret_is_not_opened(serving: Serving, connected: Settings) -> None:
    Bomb.exploded.clear()
    ref = await serving(Model).same.remote(Bomb())
    await anyio.to_thread.run_sync(lambda: ref.result(5))
    seen = len(Bomb.exploded)
    engines.use(Settings(connected.url, secret_key=b"another secret"))

    with pytest.raises(SignatureError, match=ref.id):
        await type(ref).from_id(ref.id)

    assert len(Bomb.exploded) == seen
