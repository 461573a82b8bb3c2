"""The socket between a launcher and its processes: JSON a line, files alongside, and no error when the peer is gone."""

import asyncio
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from millstream.replicas.control import Control, PlainControl
from tests.helpers import wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


async def read(control: Control, count: int) -> list[Any]:
    messages = []
    async for message in control.messages():
        messages.append(message)
        if len(messages) == count:
            break
    return messages


async def test_messages_arrive_whole_and_in_order(sockets: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = Control(sockets[0]), Control(sockets[1])
    sent: list[dict[str, Any]] = [{"n": 1}, {"text": "a\nb é"}, {"long": "x" * 1_000_000}, {"n": 2}]

    async def send() -> None:
        for message in sent:
            await ours.send(message)

    sending = asyncio.create_task(send())

    assert await read(theirs, 4) == sent
    await sending


async def test_message_that_comes_in_pieces_is_put_together(sockets: tuple[socket.socket, socket.socket]) -> None:
    reading = asyncio.create_task(read(Control(sockets[1]), 2))

    for piece in (b'{"a"', b": 1}", b'\n{"b": 2}', b"\n"):
        sockets[0].sendall(piece)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    assert await reading == [{"a": 1}, {"b": 2}]


async def test_messages_end_when_the_peer_is_gone(sockets: tuple[socket.socket, socket.socket]) -> None:
    control = Control(sockets[1])
    sockets[0].sendall(b'{"last": 1}\n{"unfini')
    sockets[0].close()

    assert [message async for message in control.messages()] == [{"last": 1}]


async def test_what_is_said_to_a_peer_that_is_gone_is_dropped(sockets: tuple[socket.socket, socket.socket]) -> None:
    control = Control(sockets[0])
    sockets[1].close()

    await control.send({"well": 1})


async def test_files_travel_with_their_message(sockets: tuple[socket.socket, socket.socket]) -> None:
    control, plain = Control(sockets[0]), PlainControl(sockets[1])
    ends = [os.pipe() for _ in range(3)]

    for number, (_, write) in enumerate(ends):
        await control.send_with_files({"n": number}, [write])
        os.close(write)
    for number, (read_end, _) in enumerate(ends):
        received = plain.receive()
        assert received is not None
        message, (file,) = received
        os.write(file, b"%d" % number)
        os.close(file)

        assert message == {"n": number}
        assert os.read(read_end, 10) == b"%d" % number
        os.close(read_end)


async def test_orders_to_a_busy_peer_wait_until_it_reads(sockets: tuple[socket.socket, socket.socket]) -> None:
    control, plain = Control(sockets[0]), PlainControl(sockets[1])
    order = {"config": "x" * 1000}

    file = sockets[0].fileno()
    sending = [asyncio.create_task(control.send_with_files(order, [file])) for _ in range(250)]
    await wait_until(lambda: any(one.done() for one in sending))
    assert not all(one.done() for one in sending), "the socket holds so many: this test needs more"

    for _ in range(250):
        received = await asyncio.to_thread(plain.receive)
        assert received is not None
        assert received[0] == order and len(received[1]) == 1
        os.close(received[1][0])
    await asyncio.gather(*sending)


async def test_order_to_a_peer_that_is_gone_is_an_error(sockets: tuple[socket.socket, socket.socket]) -> None:
    sockets[1].close()

    with pytest.raises(OSError):
        await Control(sockets[0]).send_with_files({"n": 1}, [0])
