"""Large arguments and values of an engine's requests, which lie in keys of their own; signed and verified off its loop."""

from functools import partial

from millstream.broker import outcomes
from millstream.broker.codec import Kind, Sealing, Verified
from millstream.errors import BrokerUnavailableError
from millstream.handles.hub import Hub
from millstream.handles.options import with_extra
from millstream.handles.route import Pending, Request, Route

PAYLOAD_TTL_MS = 600_000  # of large arguments, until submit has seen them


class LargeValues:
    """What an engine reads and writes over its bulk connections. All of it may be repeated."""

    def __init__(self, hub: Hub) -> None:
        self._hub, self._bulk = hub, hub.lines.bulk
        self._fetching: set[bytes] = set()

    # arguments

    def seal(self, request: Request) -> None:
        """Make an envelope of the arguments of a request, where they are large. Once."""
        pickled = request.arguments
        if pickled is None or request.payload is not None:
            return
        request.payload = request.route.codec.sealing("request", request.pending.ref, pickled, request.method)
        request.extras = with_extra(request.extras, payload=request.payload.size_bytes)

    async def write_arguments(self, request: Request) -> None:
        """Store them, ahead of the submit. What is there already stays: it may be in use. Raises BrokerUnavailableError."""
        assert request.payload is not None
        keys, ref = request.route.keys, request.pending.ref.decode()
        await self._bulk.write(keys, keys.payload(ref), request.payload, PAYLOAD_TTL_MS, only_new=True)
        request.is_written = True

    def forget_arguments(self, request: Request) -> None:
        """The server does not have the request that they belong to, and will not."""
        commands = self._hub.lines.commands
        if request.is_written and not request.is_shared and commands is not None:
            commands.send(_ignore, "UNLINK", request.route.keys.payload(request.pending.ref.decode()))

    # values

    def fetch(self, pending: Pending, stored: bytes) -> None:
        """Read a value that lies in a key of its own, and settle `pending` with it."""
        if pending.is_over:
            self._hub.settle(pending, stored)  # nobody wants it any more
        elif pending.ref not in self._fetching:
            self._fetching.add(pending.ref)
            self._hub.start(self._fetch(pending, stored))

    async def _fetch(self, pending: Pending, stored: bytes) -> None:
        route, ref = self._hub.route(pending.codec.tag), pending.ref
        try:
            large = await self.read(route, "value", ref, stored)
            self._hub.settle(self._hub.pending.get(ref, pending), stored, large)
        except BrokerUnavailableError:
            return  # whoever looks after what waits long will find it again
        except Exception as e:
            self._hub.sender.refused(route, [ref], e)
        finally:
            self._fetching.discard(ref)

    async def read(self, route: Route, kind: Kind, ref: bytes, stored: bytes, method: bytes = b"") -> Verified | None:
        """What `stored` says lies elsewhere; None if it has expired. Raises BrokerUnavailableError, SignatureError."""
        part = outcomes.large_part(stored)
        assert part is not None
        key, size_bytes = route.keys.value(ref.decode(), part), outcomes.large_size(stored)
        return await self._bulk.read(key, size_bytes, partial(route.codec.opening, kind, ref, method))

    async def put(self, route: Route, ref: bytes, envelope: bytes | Sealing, ttl_s: float) -> None:
        """Store a value under a ref of its own; a large one in a key of its own."""
        commands, ttl_ms = await self._hub.lines.link(), int(ttl_s * 1000)
        if not isinstance(envelope, bytes):
            await self._bulk.write(route.keys, route.keys.value(ref.decode(), "-"), envelope, ttl_ms)
            envelope = b"@%d\n" % envelope.size_bytes
        await commands.ask("SET", route.keys.result(ref.decode()), b"succeeded - -\n" + envelope, "PX", ttl_ms)


def _ignore(reply: object) -> None:
    """What could not be deleted has a TTL."""
