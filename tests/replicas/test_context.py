"""`serve.get_replica_context()`: from the constructor on, in all code of a replica, and nowhere else."""

import asyncio
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from millstream import serve
from millstream.errors import MillstreamError
from millstream.handles.context import Request, current
from millstream.replicas.context import constructed
from tests.helpers import wait_until
from tests.replica_helpers import NODE, Hosted, Stage
from tests.replicas.batched import together

pytestmark = pytest.mark.anyio


class Model:
    """Looks at its context wherever its code can run."""

    def __init__(self) -> None:
        self.at_construction = serve.get_replica_context()
        self.at_configuration: Any = None
        self.background = asyncio.get_running_loop().create_task(self.look_later())

    async def look_later(self) -> Any:
        await wait_until(lambda: serve.get_replica_context().servable_object is not None)
        return serve.get_replica_context().servable_object is self

    def reconfigure(self, _: Any) -> None:
        self.at_configuration = serve.get_replica_context().servable_object

    def describe(self) -> tuple[Any, ...]:
        context = serve.get_replica_context()
        names = (context.app_name, context.deployment, context.replica_tag, context.node, context.version)
        return (*names, context.max_ongoing_requests, context.servable_object is self)

    async def __call__(self) -> Any:
        return self.describe()

    async def suspending(self) -> Any:
        await asyncio.sleep(0)
        return self.describe()

    def in_thread(self) -> Any:
        return threading.current_thread() is not threading.main_thread() and self.describe()

    async def to_thread(self) -> Any:
        return await asyncio.to_thread(self.describe)

    @serve.batch(batch_wait_timeout_s=0)
    async def batched(self, xs: list[int]) -> list[Any]:
        return [self.describe() for _ in xs]

    @serve.multiplexed
    async def loaded(self, model_id: str) -> Any:
        return self.describe()

    async def early(self) -> tuple[Any, ...]:
        before = self.at_construction
        return before.servable_object, before.deployment, self.at_configuration is self, await self.background


def expected(stage: Stage, replica: Hosted, ongoing: int = 100) -> tuple[Any, ...]:
    return ("app", "Model", replica.name, NODE, stage._version, ongoing, True)


@pytest.mark.parametrize(
    ("method", "args"),
    [("__call__", ()), ("suspending", ()), ("in_thread", ()), ("to_thread", ()), ("batched", (1,)), ("loaded", ("a",))],
)
async def test_all_code_of_a_replica_knows_where_it_is(stage: Stage, method: str, args: Any) -> None:
    replica = await stage.start(Model)

    assert await stage.handle.options(method_name=method).call(*args) == expected(stage, replica)


async def test_constructor_knows_its_replica_and_not_yet_the_object(stage: Stage) -> None:
    await stage.start(Model, user_config=1)

    assert await stage.handle.early.call() == (None, "Model", True, True)


async def test_replicas_in_one_process_are_told_apart(stage: Stage) -> None:
    replicas = [await stage.start(Model, max_ongoing_requests=1) for _ in range(2)]

    seen = set[Any]()
    while len(seen) < 2:
        seen |= set(await together(*(stage.handle.suspending.call() for _ in range(4))))

    assert seen == {expected(stage, replica, 1) for replica in replicas}


async def test_function_is_its_own_object(stage: Stage) -> None:
    async def function() -> Any:
        context = serve.get_replica_context()
        return context.servable_object.__name__, context.replica_id == context.replica_tag

    await stage.start(function)

    assert await stage.handle.call() == ("function", True)


async def test_outside_of_a_replica_there_is_none(stage: Stage) -> None:
    with pytest.raises(MillstreamError, match="outside of a replica; call it in"):
        serve.get_replica_context()

    await stage.start(Model)

    with pytest.raises(MillstreamError, match="outside of a replica"):
        serve.get_replica_context()


async def test_request_alone_is_no_replica() -> None:
    current.set(Request("app.Model", b"1"))
    constructed(object())

    with pytest.raises(MillstreamError):
        serve.get_replica_context()


def test_threads_of_one_request_may_send_at_once_and_none_is_forgotten() -> None:
    for _ in range(200):
        request, at_once = Request("app.Model", b"1"), threading.Barrier(4)

        def send(request: Request = request, at_once: threading.Barrier = at_once) -> None:
            at_once.wait(5)
            request.sends(None, None)  # type: ignore[arg-type]

        with ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(send) for _ in range(4)]:
                done.result(5)
        assert len(request._children or ()) == 4


def test_context_cannot_be_changed_and_equals_itself_whatever_it_serves() -> None:
    context = serve.ReplicaContext("app", "Model", "r-1", "node", "v", 100, servable_object=[])

    with pytest.raises(dataclasses.FrozenInstanceError):
        context.app_name = "other"  # type: ignore[misc]
    assert hash(context) == hash(dataclasses.replace(context, servable_object=None))
