"""Large values of this replica's requests, in keys of their own, over connections of their own; signed off its loop."""

from functools import partial
from typing import Any

from millstream.broker import outcomes
from millstream.broker.bulk import Bulk
from millstream.broker.codec import Codec, Kind, Verified, codec_for
from millstream.broker.keys import DeploymentKeys, Keys, split_ref
from millstream.broker.pickling import Pickled
from millstream.config import Settings
from millstream.errors import MillstreamError

WRITE_TTL_MS = 600_000  # until finish or emit has taken it over


class LargeValues:
    """Reads and writes them; waits out lost connections. Whoever is cancelled meanwhile leaves nothing under their key."""

    def __init__(self, settings: Settings, keys: DeploymentKeys, name: str) -> None:
        self._settings, self._keys = settings, keys
        self._all_keys = Keys(settings.namespace)
        self._codec = codec_for(settings.secret_key, settings.namespace, keys.tag)
        self._bulk = Bulk(settings, name, patience_s=None)

    async def read_payload(self, ref: bytes, method: bytes, size_bytes: int) -> Verified:
        """The large arguments of a request. Raises MillstreamError if they are gone, SignatureError."""
        opening = partial(self._codec.opening, "request", ref, method)
        payload = await self._bulk.read(self._keys.payload(ref.decode()), size_bytes, opening)
        if payload is None:
            raise MillstreamError(
                f"the arguments of request {self._keys.tag}~{ref.decode()} are gone from the server: it evicted them, or "
                "lost them in a restart; send it again, and see that its maxmemory-policy is noeviction"
            )
        return payload

    def open_small(self, supplied: dict[str, bytes]) -> dict[str, Any]:
        """As `read_all`, where none of them is large."""
        values = {}
        for ref_id, stored in supplied.items():
            tag, ref = split_ref(ref_id)
            values[ref_id] = outcomes.open_stored(self._codec_of(tag), ref.encode(), stored)
        return values

    async def read_all(self, supplied: dict[str, bytes]) -> dict[str, Any]:
        """The values of refs among the arguments: ref id -> value. Raises what their requests raised."""
        values = {}
        for ref_id, stored in supplied.items():
            tag, ref = split_ref(ref_id)
            codec = self._codec_of(tag)
            part, large = outcomes.large_part(stored), None
            if part is not None:
                key = self._all_keys.deployment(tag).value(ref, part)
                opening = partial(codec.opening, "value", ref.encode())
                large = await self._bulk.read(key, outcomes.large_size(stored), opening)
            values[ref_id] = outcomes.open_stored(codec, ref.encode(), stored, large)
        return values

    def _codec_of(self, tag: str) -> Codec:
        return codec_for(self._settings.secret_key, self._settings.namespace, tag)

    async def write_value(self, ref: bytes, part: str, pickled: Pickled) -> bytes:
        """Store the value of a request; what its result key holds in its place."""
        return b"@%d\n" % await self._write(ref, part, pickled, "value")

    async def write_item(self, ref: bytes, part: str, pickled: Pickled, number: bytes) -> bytes:
        """Store an item of a stream; what stands in the stream in its place."""
        return b"@%d %b\n" % (await self._write(ref, part, pickled, "item", number), part.encode())

    async def _write(self, ref: bytes, part: str, pickled: Pickled, kind: Kind, method: bytes = b"") -> int:
        sealing = self._codec.sealing(kind, ref, pickled, method)
        await self._bulk.write(self._keys, self._keys.value(ref.decode(), part), sealing, WRITE_TTL_MS)
        return sealing.size_bytes

    def close(self) -> None:
        self._bulk.close()
