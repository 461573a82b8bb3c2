"""Who else serves this deployment. During a redeploy there are replicas of two versions, and requests for either."""

from collections.abc import Awaitable, Callable
from typing import Any

from millstream.broker.keys import DeploymentKeys
from millstream.broker.records import ReplicaRecord
from millstream.broker.signed import UNREADABLE, Signer


class OtherVersions:
    """Of the deployment that this replica serves in one version."""

    def __init__(self, keys: DeploymentKeys, signer: Signer, version: str, ask: Callable[..., Awaitable[Any]]) -> None:
        self._keys, self._signer, self._version, self._ask = keys, signer, version, ask

    async def are_there(self) -> bool:
        """Does one serve, start, or is one to come? Raises BrokerUnavailableError."""
        names = await self._ask("HKEYS", self._keys.replicas)
        records = await self._ask("HMGET", self._keys.replicas, *names) if names else ()
        if any(map(self._is_other, names, records)):
            return True
        version, revision = await self._ask("HMGET", self._keys.config, "version", "revision")
        if version is None or version.decode() == self._version:
            return False
        failed: bytes | None = await self._ask("HGET", self._keys.status, "failed_revision")
        return bool(failed != revision)  # else it has been tried, and cannot start

    def _is_other(self, name: bytes, record: bytes | None) -> bool:
        try:
            found = self._signer.read(ReplicaRecord, record or b"", self._keys.tag, name.decode())
        except UNREADABLE:  # gone meanwhile, or some other program wrote it
            return False
        return found.version != self._version
