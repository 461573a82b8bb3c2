"""A TCP proxy before the server, in a process of its own, which ends connections in mid-word or lets nothing pass.

    python -m chaos.proxy LISTEN TARGET        (ports of this host)

It reads orders from stdin, a line each: `cut SHARE SEED` ends so large a share of the connections, each within the next
piece of data that comes along; `stall SECONDS`. It ends with its stdin.
"""

import asyncio
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PIECE_BYTES = 64 * 1024
AT_LATEST_S = 1.0  # a connection that is to be cut carries something by then, or ends all the same


class Connection:
    """Two pumps, one for each direction."""

    def __init__(self, proxy: "Proxy", near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self._proxy, self._writers = proxy, (near, far)
        self.cut_at: int | None = None  # after so many bytes of the next piece

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, RuntimeError), self._ending():  # uvloop raises the latter where it has closed it already
            while data := await reader.read(PIECE_BYTES):
                await self._proxy.is_open.wait()
                if self.cut_at is not None:
                    writer.write(data[: self.cut_at % len(data)])
                    break
                writer.write(data)
                await writer.drain()

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """However one direction ends, the other one does, too."""
        try:
            yield
        finally:
            self.end()

    def end(self) -> None:
        for writer in self._writers:
            writer.close()


class Proxy:
    def __init__(self, target: int) -> None:
        self._target = target
        self._connections: set[Connection] = set()
        self.is_open = asyncio.Event()
        self.is_open.set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        connection = Connection(self, writer, far_writer)
        self._connections.add(connection)
        try:
            await asyncio.gather(connection.pump(reader, far_writer), connection.pump(far_reader, writer))
        finally:
            self._connections.discard(connection)

    async def obey(self, order: str, *arguments: str) -> None:
        match order:
            case "cut":
                chance = random.Random(int(arguments[1]))
                chosen = [c for c in list(self._connections) if chance.random() < float(arguments[0])]
                for connection in chosen:
                    connection.cut_at = chance.randrange(1_000)
                await asyncio.sleep(AT_LATEST_S)
                for connection in chosen:
                    connection.end()
            case "stall":
                self.is_open.clear()
                await asyncio.sleep(float(arguments[0]))
                self.is_open.set()


async def run(listen: int, target: int) -> None:
    proxy = Proxy(target)
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", listen)
    obeying: set[asyncio.Task[None]] = set()
    while line := await orders.readline():
        obeying.add(asyncio.create_task(proxy.obey(*line.decode().split())))
    server.close()


if __name__ == "__main__":
    import uvloop

    uvloop.run(run(int(sys.argv[1]), int(sys.argv[2])))
