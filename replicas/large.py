"""Large values of this replica's requests, in keys of their own, over a connection of their own."""

import asyncio
from typing import Any

from millstream.broker import outcomes
from millstream.broker.codec import codec_for
from millstream.broker.connection import backoff
from millstream.broker.keys import DeploymentKeys, Keys, split_ref
from millstream.broker.link import Link, dial
from millstream.broker.pickling import Pickled
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError, MillstreamError

WRITE_TTL_MS = 600_000  # until finish or emit has taken it over
IN_A_THREAD_BYTES = 1024 * 1024  # to sign more than that (about 1 ms) would hold up the loop


class LargeValues:
    """Reads and writes them; waits out lost connections."""

    def __init__(self, settings: Settings, keys: DeploymentKeys, name: str) -> None:
        self._settings, self._keys, self._name = settings, keys, name
        self._all_keys = Keys(settings.namespace)
        self._codec = codec_for(settings.secret_key, settings.namespace, keys.tag)
        self._link: Link | None = None
        self._one_dials = asyncio.Lock()

    @staticmethod
    def are_among(supplied: dict[str, bytes]) -> bool:
        return any(outcomes.large_part(stored) is not None for stored in supplied.values())

    async def read_payload(self, ref: bytes) -> bytes:
        """The envelope of large arguments. Raises MillstreamError if they are gone."""
        payload: bytes | None = await self._ask("GET", self._keys.payload(ref.decode()))
        if payload is None:
            raise MillstreamError(
                f"the arguments of request {self._keys.tag}~{ref.decode()} are gone from the server: it evicted them, or "
                "lost them in a restart; send it again, and see that its maxmemory-policy is noeviction"
            )
        return payload

    async def read_all(self, supplied: dict[str, bytes]) -> dict[str, Any]:
        """The values of refs among the arguments: ref id -> value. Raises what their requests raised."""
        values = {}
        for ref_id, stored in supplied.items():
            tag, ref = split_ref(ref_id)
            part, large = outcomes.large_part(stored), None
            if part is not None:
                large = await self._ask("GET", self._all_keys.deployment(tag).value(ref, part))
            codec = codec_for(self._settings.secret_key, self._settings.namespace, tag)
            values[ref_id] = outcomes.open_stored(codec, ref.encode(), stored, large)
        return values

    def open_all(self, supplied: dict[str, bytes]) -> dict[str, Any]:
        """As `read_all`, where none of them is large."""
        values = {}
        for ref_id, stored in supplied.items():
            tag, ref = split_ref(ref_id)
            codec = codec_for(self._settings.secret_key, self._settings.namespace, tag)
            values[ref_id] = outcomes.open_stored(codec, ref.encode(), stored)
        return values

    async def write_value(self, ref: bytes, part: str, pickled: Pickled) -> bytes:
        """Store the value of a request; what its result key holds in its place."""
        return await self._write(ref, part, pickled, ("value", ref, pickled))

    async def write_item(self, ref: bytes, number: bytes, pickled: Pickled) -> bytes:
        """Store an item of a stream; what stands in the stream in its place."""
        return await self._write(ref, number.decode(), pickled, ("item", ref, pickled, number))

    async def _write(self, ref: bytes, part: str, pickled: Pickled, what: tuple[Any, ...]) -> bytes:
        if pickled.size_bytes > IN_A_THREAD_BYTES:
            parts = await asyncio.to_thread(self._codec.seal_parts, *what)
        else:
            parts = self._codec.seal_parts(*what)
        delays = backoff()
        while True:
            try:
                link = await self._connected()
                await link.set_parts(self._keys.value(ref.decode(), part), parts, WRITE_TTL_MS)
                return b"@%d\n" % sum(map(len, parts))
            except BrokerUnavailableError:
                await asyncio.sleep(next(delays))

    async def _ask(self, *command: Any) -> Any:
        delays = backoff()
        while True:
            try:
                return await (await self._connected()).ask(*command)
            except BrokerUnavailableError:
                await asyncio.sleep(next(delays))

    async def _connected(self) -> Link:
        async with self._one_dials:
            if self._link is None or not self._link.is_up:
                self._link = await dial(self._settings, f"ms:bulk:{self._name}")
            return self._link

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
