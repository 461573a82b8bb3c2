"""Who else serves this deployment. During a redeploy there are replicas of two versions, and requests for either."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from millstream.broker.keys import DeploymentKeys


class OtherVersions:
    """Of the deployment that this replica serves in one version."""

    def __init__(self, keys: DeploymentKeys, version: str, ask: Callable[..., Awaitable[Any]]) -> None:
        self._keys, self._version, self._ask = keys, version, ask

    async def are_there(self) -> bool:
        """Does one serve, start, or is one to come? Raises BrokerUnavailableError."""
        records = await self._ask("HVALS", self._keys.replicas)
        if any(json.loads(text)["version"] != self._version for text in records or ()):
            return True
        version, revision = await self._ask("HMGET", self._keys.config, "version", "revision")
        if version is None or version.decode() == self._version:
            return False
        failed: bytes | None = await self._ask("HGET", self._keys.status, "failed_revision")
        return bool(failed != revision)  # else it has been tried, and cannot start
