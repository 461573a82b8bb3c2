"""Un-awaited tasks as arguments: their failures belong to what depends on them."""

import asyncio
import gc
from typing import Any

import pytest

from millstream.handles import arguments
from millstream.handles.arguments import RefTask
from millstream.handles.ref import ObjectRef


@pytest.mark.anyio
@pytest.mark.parametrize("nested", [False, True])
async def test_failure_of_a_task_that_was_an_argument_is_not_reported_as_forgotten(nested: bool) -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    async def refused() -> ObjectRef:
        raise RuntimeError("refused")

    task = RefTask(refused(), loop=asyncio.get_running_loop())
    task.ref = ObjectRef.from_id("app.Model~" + "r" * 22)
    arguments.encode("app.Next", ([task] if nested else task,), {})
    await asyncio.wait([task])
    await asyncio.sleep(0)  # its callbacks have run
    del task
    gc.collect()

    assert reported == []
