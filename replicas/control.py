"""The socket between a launcher and one of its processes: JSON, one message a line, file descriptors alongside."""

import array
import asyncio
import contextlib
import errno
import json
import socket
from collections.abc import AsyncIterator
from typing import Any, Protocol

RETRY_S = 0.005


class Overseer(Protocol):
    """Who has started a replica and watches over it, as the replica sees it: a `Control` leads to its launcher."""

    async def send(self, message: dict[str, Any]) -> None: ...
    def messages(self) -> AsyncIterator[dict[str, Any]]: ...


class Control:
    """The asynchronous end. Messages to a peer that is gone are dropped; `messages()` then ends."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.setblocking(False)
        self._one_at_a_time = asyncio.Lock()

    async def send(self, message: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # it is gone: whoever reads `messages` hears of that
            await loop.sock_sendall(self._socket, json.dumps(message).encode() + b"\n")

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """The peer's messages, until it is gone."""
        loop, buffer = asyncio.get_running_loop(), b""
        while True:
            try:
                data = await loop.sock_recv(self._socket, 65536)
            except OSError:
                data = b""
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                yield json.loads(line)

    async def send_with_files(self, message: dict[str, Any], files: list[int]) -> None:
        """Send a message with open files; waits while the peer has enough to read. Raises OSError if it is gone."""
        data = json.dumps(message).encode() + b"\n"
        async with self._one_at_a_time:
            while True:
                try:
                    sent = socket.send_fds(self._socket, [data], files)
                    break
                except BlockingIOError:
                    await asyncio.sleep(RETRY_S)
                except OSError as e:
                    if e.errno != errno.ETOOMANYREFS:  # of open files under way; their number is limited, too
                        raise
                    await asyncio.sleep(RETRY_S)
            if sent < len(data):
                await asyncio.get_running_loop().sock_sendall(self._socket, data[sent:])

    def close(self) -> None:
        self._socket.close()


class PlainControl:
    """The blocking end, for the warm parent: it must not have a loop or threads when it forks."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = b""
        self._files: list[int] = []

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """A peer that is gone is not told; `receive` will say that it is gone."""
        with contextlib.suppress(ConnectionError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next message with the files that came along; None when the peer is gone."""
        while b"\n" not in self._buffer:
            size = array.array("i").itemsize
            try:
                data, ancillary, _, _ = self._socket.recvmsg(65536, socket.CMSG_SPACE(8 * size))
            except ConnectionError:  # the launcher went without reading our last words
                return None
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    files = array.array("i")
                    files.frombytes(content[: len(content) - len(content) % size])
                    self._files += files
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        files_now, self._files = self._files, []
        return json.loads(line), files_now

    def has_buffered(self) -> bool:
        return b"\n" in self._buffer
