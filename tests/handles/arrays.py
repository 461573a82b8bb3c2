"""A deployment that takes and makes large arrays. Import it after `pytest.importorskip(\"numpy\")`."""

from typing import Any

import numpy as np

from millstream.broker.keys import DeploymentKeys
from millstream.handles.handle import DeploymentHandle
from tests.replica_helpers import Gate

MB = 1_000_000


class Model:
    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate or Gate()
        self.own = np.zeros(MB, np.uint8)

    async def echo(self, value: Any) -> Any:
        return value

    def echo_in_thread(self, value: Any) -> Any:
        return value

    async def add_one(self, array: Any) -> Any:
        array += 1  # in place: what arrives can be written to
        return array

    async def make(self, size: int, value: int = 1) -> Any:
        return np.full(size, value, np.uint8)

    async def total(self, *arrays: Any) -> int:
        return int(sum(int(array.sum()) for array in arrays))

    async def held_total(self, array: Any) -> int:
        await self.gate.wait()
        return int(array.sum())

    async def held_array(self, size: int) -> Any:
        await self.gate.wait()
        return ones(size)

    async def its_own(self, value: int) -> Any:
        self.own[:] = value
        return self.own

    async def small(self, value: int) -> int:
        return value


def keys_of(handle: DeploymentHandle) -> DeploymentKeys:
    return DeploymentKeys("ms", f"{handle.app_name}.{handle.deployment_name}")


def ones(size: int) -> Any:
    return np.ones(size, np.uint8)
