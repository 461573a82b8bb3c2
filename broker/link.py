"""The hot transport: pipelined commands over one TCP or Unix connection, parsed by hiredis, without a task per command.

Commands are answered in order, each by calling its callback with the reply (an exception instance where it failed).
Reconnecting is the owner's business: a link that is lost stays lost.
"""

import asyncio
import contextlib
import functools
import logging
import os
import re
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import hiredis
import redis.exceptions
from redis.asyncio.connection import SSLConnection, parse_url

from millstream.broker.call import Call, Script
from millstream.config import Settings, redact
from millstream.errors import (
    BackPressureError,
    BrokerUnavailableError,
    ConfigError,
    MillstreamError,
    PayloadTooLargeError,
    SignatureError,
)

T = TypeVar("T")
Callback = Callable[[Any], None]

DEAD_AFTER_S = 20
CONNECT_TIMEOUT_S = 5.0  # a server that does not even answer AUTH for so long is down
pack = hiredis.pack_command
# The server said no, or what it holds is not of ours: no outage, and no reason to end.
REFUSED = (redis.exceptions.ResponseError, hiredis.ReplyError, SignatureError)
NOT_OURS = (ValueError, TypeError, IndexError, AttributeError)  # what comes of reading something of another shape
log = logging.getLogger("millstream.broker")


class Link(asyncio.Protocol):
    """One connection. Use it from the loop it was made on."""

    def __init__(self, on_message: Callable[[bytes], None] | None = None) -> None:
        self._reader = hiredis.Reader()
        self._callbacks: deque[Callback] = deque()
        self._on_message = on_message
        self._transport: asyncio.Transport | None = None
        self._leaving: asyncio.Transport | None = None  # after `finish`
        self._sent_scripts: set[Script] = set()
        self._held: list[bytes] | None = None  # what is written together, while there is such
        self.client_id = 0
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        _notice_a_silent_death(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        reader, callbacks = self._reader, self._callbacks
        reader.feed(data)
        try:
            while (reply := reader.gets()) is not False:
                if self._on_message is None or type(reply) is not list:
                    callbacks.popleft()(reply)
                elif reply[0] == b"smessage":
                    self._on_message(reply[2])
                elif reply[0] == b"sunsubscribe":  # nobody asked: the slot of the channel has moved to another node
                    self.close()
                else:
                    callbacks.popleft()(reply)
        except hiredis.ProtocolError as e:  # that is no Redis server
            self.close()
            self.connection_lost(e)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = self._leaving = None
        if not self.lost.done():
            self.lost.set_result(None)
        error = BrokerUnavailableError(f"the connection to the server was lost ({exc or 'closed by the server'})")
        while self._callbacks:
            self._callbacks.popleft()(error)

    # commands

    @property
    def is_up(self) -> bool:
        return self._transport is not None

    def send(self, callback: Callback, *command: Any) -> None:
        """Write one command; `callback` gets its reply, or an exception instance. At once if the link is down."""
        if self._transport is None:
            callback(BrokerUnavailableError("the connection to the server is down"))
            return
        self._callbacks.append(callback)
        if self._held is None:
            self._transport.write(pack(command))
        else:
            self._held.append(pack(command))

    def hold(self) -> None:
        """Write nothing until `let_go`: several commands then take one system call here, and one in the server."""
        self._held = []

    def let_go(self) -> None:
        held, self._held = self._held, None
        if held and self._transport is not None:
            self._transport.write(b"".join(held))

    def ask(self, *command: Any) -> asyncio.Future[Any]:
        """As `send`, with a future. Cancelling it does not take the command back."""
        future: asyncio.Future[Any] = self.lost.get_loop().create_future()
        self.send(functools.partial(self.settle, future), *command)
        return future

    def start(self, call: Call[T], callback: Callable[[T | Exception], None]) -> None:
        """Run a script; `callback` gets its reply as read by the call, or an exception instance."""

        def replied(reply: Any) -> None:
            if not isinstance(reply, Exception):
                try:
                    answer: T | Exception = call.read(reply)
                except NOT_OURS as e:  # the script hands on what stands in Redis
                    answer = foreign(str(e))
                callback(answer)
            elif str(reply).startswith("NOSCRIPT"):
                self.send(replied, *call.full_command())
            else:
                callback(self._refused(reply))

        if call.script in self._sent_scripts:
            self.send(replied, *call.command())
        else:
            # With its source: a NOSCRIPT would come back when other calls are on their way, which would then pass this one.
            self._sent_scripts.add(call.script)
            self.send(replied, *call.full_command())

    def run(self, call: Call[T]) -> asyncio.Future[T]:
        """As `start`, with a future."""
        future: asyncio.Future[T] = self.lost.get_loop().create_future()
        self.start(call, functools.partial(self.settle, future))
        return future

    def settle(self, future: asyncio.Future[Any], reply: Any) -> None:
        """Give a reply to who waits for it, if anybody still does."""
        if future.done():
            return
        if isinstance(reply, Exception):
            future.set_exception(self._refused(reply))
        else:
            future.set_result(reply)

    def _refused(self, reply: Exception) -> Exception:
        """An error reply in our words. Where the slot has moved to another node, this connection is of no more use."""
        if str(reply).startswith("MOVED "):
            self.close()
        return explain(reply)

    def hand_over(self, protocol: asyncio.BaseProtocol) -> asyncio.Transport:
        """Let another protocol speak over this connection; nothing may be under way. Raises BrokerUnavailableError."""
        transport, self._transport = self._transport, None
        if transport is None:
            raise BrokerUnavailableError("the connection to the server is down")
        transport.set_protocol(protocol)
        return transport

    def finish(self) -> None:
        """Close once all that was written is sent. Pending callbacks get BrokerUnavailableError."""
        if self._transport is not None:
            self._leaving, self._transport = self._transport, None
            self._leaving.close()

    def ends(self) -> list[asyncio.Future[None]]:
        """Done when every connection of this link is closed: over TLS, when the server has said goodbye as well."""
        return [self.lost]

    def close(self) -> None:
        """Close at once. Pending callbacks get BrokerUnavailableError."""
        if transport := self._transport or self._leaving:
            transport.abort()


def _notice_a_silent_death(sock: socket.socket) -> None:
    """Have the kernel end a connection whose peer or network has gone without a word, after about DEAD_AFTER_S.

    Else the first call of a morning would hang for the 15 minutes that TCP goes on trying.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", DEAD_AFTER_S // 2),
        ("TCP_KEEPINTVL", DEAD_AFTER_S // 4),
        ("TCP_KEEPCNT", 2),
        ("TCP_USER_TIMEOUT", DEAD_AFTER_S * 1000),
    ):
        if hasattr(socket, name):  # not all of them on macOS
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


CANNOT_NOW = (
    redis.exceptions.ReadOnlyError,
    redis.exceptions.MasterDownError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.AskError,  # and MovedError
    redis.exceptions.TryAgainError,
)
CANNOT_NOW_CODES = (
    "LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "MOVED ", "ASK ", "TRYAGAIN",
    "UNBLOCKED",  # the server was demoted while we waited in it
)  # fmt: skip


def _context(address: dict[str, Any]) -> ssl.SSLContext | None:
    """For TLS, what redis-py makes of the ssl_... options of a URL; so both transports agree on them."""
    if not issubclass(address.get("connection_class", object), SSLConnection):
        return None
    options = {name: value for name, value in address.items() if name.startswith("ssl_")}
    return _context_of(tuple(options.items()), tuple(map(_changed_at, options.values())))


# To read the system's authorities takes 40 to 80 ms, in which the loop stands still; a link into a cluster is several.
@functools.lru_cache(maxsize=8)
def _context_of(options: tuple[tuple[str, Any], ...], changed: tuple[float, ...]) -> ssl.SSLContext:
    """Made anew when a file that the options name has changed: certificates end, and are replaced while we run."""
    context: ssl.SSLContext = SSLConnection(**dict(options)).ssl_context.get()
    return context


def _changed_at(option: Any) -> float:
    try:
        return os.stat(option).st_mtime if isinstance(option, str) else 0.0
    except OSError:
        return 0.0


_BYTES = {bytes}
_NESTED = re.compile(rb"\r\n[*%~>|]")  # an array in an array; or a text that has that in it
_HEADER, _TEXT = re.compile(rb"\*(\d{1,9})\r\n"), re.compile(rb"\$(\d{1,12})\r\n")
_NO_PERMISSION = ("NOPERM", "ACL failure in script", "The user executing the script can't")  # the last: Redis 7.0


class Messages:
    """Takes apart what the scripts publish: each message is a RESP array of ref, stored, ref, stored, ...

    What is none was sent by some other program: nothing of it is heard.
    """

    def __init__(self) -> None:
        self._reader = hiredis.Reader()

    def read(self, message: bytes) -> list[bytes]:
        if _may_be_huge(message):
            items: Any = _take_apart(message)
        else:
            self._reader.feed(message)
            try:
                items = self._reader.gets()
            except hiredis.ProtocolError:
                items = None
        if type(items) is list and {*map(type, items)} <= _BYTES and not (len(items) % 2 or self._reader.has_data()):
            return items
        self._reader = hiredis.Reader()  # it may wait for the rest
        log.error("message %r on a reply channel is no reply: some other program sent it", message[:100])
        return []


def _may_be_huge(message: bytes) -> bool:
    """May it announce more items than it has? hiredis makes room for them first: 8 GB and 12 s for 16 bytes."""
    if message[:9] == b"*2\r\n$22\r\n" and message[31:34] == b"\r\n$":  # of one request: two texts
        return False
    if message[:1] != b"*" or not message[1 : message.find(b"\r\n", 1, 8)].isdigit():
        return True
    return _NESTED.search(message) is not None


def _take_apart(message: bytes) -> list[bytes] | None:
    """As hiredis does, item by item, without believing it; None if it is no array of texts."""
    header, at, items = _HEADER.match(message), 0, list[bytes]()
    if header is None:
        return None
    at = header.end()
    while (text := _TEXT.match(message, at)) is not None:
        at = text.end() + int(text[1]) + 2
        items.append(message[text.end() : at - 2])
    return items if at == len(message) and len(items) == int(header[1]) else None


def explain(reply: Exception) -> Exception:
    """An error reply of the server as one of ours, where there is one for it."""
    text = str(reply)
    if isinstance(reply, MillstreamError):
        return reply
    # redis-py has cut the code off the text and made a class of it; hiredis has not.
    if text.startswith("OOM") or isinstance(reply, redis.exceptions.OutOfMemoryError):
        return BackPressureError(
            f"the server is out of memory and takes no more requests ({text}); "
            "wait for the backlog to shrink, or raise its maxmemory"
        )
    if text.startswith(CANNOT_NOW_CODES) or isinstance(reply, CANNOT_NOW):
        return BrokerUnavailableError(f"the server cannot take commands now ({text})")
    if isinstance(reply, redis.exceptions.NoPermissionError) or any(words in text for words in _NO_PERMISSION):
        return ConfigError(
            f"the server's user may not do that: NOPERM {text.removeprefix('NOPERM ')}; "
            "what each part of millstream needs is in docs/keyspace.md, under access rules"
        )
    if "TOOMANYREFS" in text:
        return PayloadTooLargeError("a request can wait for 3900 refs at most; pass the others inside a list, as refs")
    if text.startswith("NOGROUP"):
        return BrokerUnavailableError(
            "the server has lost this deployment's streams; whoever reads them makes them anew"
        )
    # What a script stumbles over: a key of another type, a text where it expects a number.
    if text.startswith("WRONGTYPE") or "user_script" in text or "Error running script" in text:
        return foreign(text)
    return reply


def foreign(what: str) -> SignatureError:
    """Something under a name of ours that millstream cannot have written."""
    return SignatureError(
        f"a key of this namespace holds what millstream has not written ({what}); "
        "see who else writes to this server, then delete that key, or deploy again"
    )


UNREACHABLE = (OSError, TimeoutError, hiredis.HiredisError, redis.exceptions.RedisError, BrokerUnavailableError)


def cannot_reach(settings: Settings, error: Exception) -> BrokerUnavailableError:
    """What is to be said where there is no connection, in one line that names the server and what to look at."""
    reason = "no answer" if isinstance(error, TimeoutError) else error
    look_at = "is it running, and is the password right?"
    if isinstance(error, ssl.SSLError) or "SSL" in str(error):
        look_at = (
            "does it speak TLS on that port, and is ssl_ca_certs the file of the authority that signed its certificate?"
        )
    elif isinstance(error, FileNotFoundError) and settings.url.startswith("rediss"):
        look_at = "are the files there that ssl_ca_certs, ssl_certfile and ssl_keyfile name?"
    return BrokerUnavailableError(f"cannot reach the server at {redact(settings.url)}: {reason}; {look_at}")


async def dial(settings: Settings, name: str, on_message: Callable[[bytes], None] | None = None) -> Link:
    """Connect, authenticate, and name the connection. Raises BrokerUnavailableError, after twice CONNECT_TIMEOUT_S."""
    return await in_time(settings, lambda: connect(settings.url, name, on_message))


async def in_time(settings: Settings, connecting: Callable[[], Awaitable[Link]]) -> Link:
    """What `connecting` gives, or the error of `dial`. URLs with their passwords stay out of sight: frames are shown.

    A machine that stood still for a while (a laptop asleep, a virtual machine at rest) finds its time used up without
    any fault of the server: it is told by a second try.
    """
    try:
        # Not `wait_for`: before Python 3.12 it forgets that it is cancelled where what it waits for has just ended.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await connecting()
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            return await connecting()
    except UNREACHABLE as e:
        raise cannot_reach(settings, e) from e


async def connect(url: str, name: str, on_message: Callable[[bytes], None] | None = None) -> Link:
    """As `dial`, for as long as it takes, and raising whatever went wrong: one of UNREACHABLE."""
    address: dict[str, Any] = dict(parse_url(url))
    loop = asyncio.get_running_loop()

    def make() -> Link:
        return Link(on_message)

    if "path" in address:
        _, link = await loop.create_unix_connection(make, address["path"])
    else:
        host, port = address.get("host", "localhost"), address.get("port", 6379)
        _, link = await loop.create_connection(make, host, port, ssl=_context(address))
    try:
        if address.get("password"):
            await link.ask("AUTH", *filter(None, (address.get("username"), address["password"])))
        if address.get("db"):
            await link.ask("SELECT", address["db"])
        await link.ask("CLIENT", "SETNAME", name)
        link.client_id = await link.ask("CLIENT", "ID")
    except BaseException:
        link.close()
        raise
    return link
