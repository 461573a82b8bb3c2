"""The end of a deployment: it takes nothing new, what waits is cancelled, what runs may finish, the rest is deleted."""

from collections.abc import Iterable
from typing import Any

import anyio

from millstream.broker import control_scripts, scripts
from millstream.broker.connection import Control, run
from millstream.broker.control_scripts import Removed
from millstream.broker.keys import DeploymentKeys
from millstream.broker.outcomes import ENDED_TTL_S
from millstream.broker.supplying import Supplier
from millstream.config import Settings

REMOVE_WITHIN_S = 25.0  # longer than graceful_shutdown_timeout_s by default
STEPS_AT_ONCE = 8  # redis-py opens a connection for each, and refuses the 101st


class Removal:
    """Nobody is left waiting for an answer. Safe to do twice, and by several at once."""

    def __init__(self, client: Control, settings: Settings) -> None:
        self._client: Any = client
        self._supplier = Supplier(settings, lambda call: run(client, call))
        self._steps = anyio.CapacityLimiter(STEPS_AT_ONCE)

    async def close(self, keys: DeploymentKeys, revision: str) -> bool:
        """Take nothing more; the launchers drain its replicas. False if it was deployed anew since that revision."""
        closed = await run(self._client, control_scripts.close(keys, revision))
        return closed == 1

    async def finish(self, all_keys: Iterable[DeploymentKeys]) -> None:
        """Wait until closed deployments have drained, and delete them."""
        # All at once: a caller's replicas end when the requests that they wait for, in a callee's queue, are gone.
        async with anyio.create_task_group() as removals:
            for keys in all_keys:
                removals.start_soon(self._finish_one, keys)

    async def _finish_one(self, keys: DeploymentKeys) -> None:
        async with self._steps:
            await self._discard(keys, running=False)
        with anyio.move_on_after(REMOVE_WITHIN_S):
            while await self._is_draining(keys):  # noqa: ASYNC110
                await anyio.sleep(0.02)
        async with self._steps:
            await self._delete(keys)

    async def _is_draining(self, keys: DeploymentKeys) -> bool:
        """It has replicas, and was not deployed again."""
        async with self._steps:
            return await self._has_living_replicas(keys) and not await self._client.exists(keys.config)

    async def step(self, keys: DeploymentKeys) -> bool:
        """As `finish`, without waiting. True when a closed deployment is gone, or was deployed again."""
        await self._discard(keys, running=False)
        if await self._has_living_replicas(keys):
            return False
        await self._delete(keys)
        return True

    async def _delete(self, keys: DeploymentKeys) -> None:
        """Unless it was deployed again meanwhile: the script looks at that in the same step."""
        while await run(self._client, control_scripts.remove(keys)) is Removed.OPEN:
            await self._discard(keys, running=True)

    async def _discard(self, keys: DeploymentKeys, *, running: bool) -> None:
        cursor, is_through = "0", False
        while not is_through:
            call = scripts.discard(keys, cursor, ENDED_TTL_S, f"deployment {keys.tag} was deleted", running=running)
            cursor, waiters = await run(self._client, call)
            is_through = cursor == "0"
            await self._supplier.supply_all(keys.tag, waiters)

    async def _has_living_replicas(self, keys: DeploymentKeys) -> bool:
        leases = [keys.lease(name.decode()) for name in await self._client.hkeys(keys.replicas)]
        return bool(leases) and await self._client.exists(*leases) > 0
