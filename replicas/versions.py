"""Who else serves this deployment. During a redeploy there are replicas of two versions, and requests for either."""

from collections.abc import Awaitable, Callable
from typing import Any

from millstream.broker.keys import DeploymentKeys
from millstream.broker.records import ReplicaRecord, read_record


class OtherVersions:
    """Of the deployment that this replica serves in one version."""

    def __init__(self, keys: DeploymentKeys, version: str, ask: Callable[..., Awaitable[Any]]) -> None:
        self._keys, self._version, self._ask = keys, version, ask

    async def are_there(self) -> bool:
        """Does one serve, start, or is one to come? Raises BrokerUnavailableError."""
        records = await self._ask("HVALS", self._keys.replicas)
        if any(_version(text) not in (self._version, None) for text in records or ()):
            return True
        version, revision = await self._ask("HMGET", self._keys.config, "version", "revision")
        if version is None or version.decode() == self._version:
            return False
        failed: bytes | None = await self._ask("HGET", self._keys.status, "failed_revision")
        return bool(failed != revision)  # else it has been tried, and cannot start


def _version(text: bytes) -> str | None:
    """Of a replica's record; None if some other program wrote it."""
    try:
        return read_record(ReplicaRecord, text).version
    except ValueError:
        return None
