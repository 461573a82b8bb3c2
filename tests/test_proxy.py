"""The proxy of the tests itself: that it loses what it is told to lose, and nothing else."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from millstream.broker.connection import Control
from millstream.broker.link import Link, dial
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError
from tests.helpers import wait_until
from tests.proxy import Limits, Proxy
from tests.servers import Server

pytestmark = [pytest.mark.anyio, pytest.mark.any_server]

SET = len(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$5\r\nvalue\r\n")


@pytest.fixture(autouse=True)
async def nothing_in_it(redis: Control) -> AsyncIterator[None]:
    yield
    await redis.delete("k")


async def to(proxy: Proxy) -> Link:
    return await dial(Settings(proxy.url), "through")


async def ends(link: Link, *command: str) -> bytes | None:
    """The answer, or None if the connection is lost first."""
    try:
        answer: bytes = await asyncio.wait_for(link.ask(*command), 10)
    except BrokerUnavailableError:
        return None
    return answer


@pytest.mark.parametrize(("count", "stored"), [(0, None), (1, None), (SET - 1, None), (SET, b"value")])
async def test_request_is_cut_at_its_byte(server: Server, redis: Control, count: int, stored: bytes | None) -> None:
    with Proxy(server.url) as proxy:
        link = await to(proxy)

        proxy.cut_after_sent(count)
        answers = [await ends(link, "SET", "k", "value")]
        answers.append(await ends(link, "GET", "k"))

    assert answers == ([None, None] if stored is None else [b"OK", None])
    assert await redis.get("k") == stored


@pytest.mark.parametrize("count", range(5))
async def test_reply_is_cut_at_its_byte_and_its_request_is_not(server: Server, redis: Control, count: int) -> None:
    with Proxy(server.url) as proxy:
        link = await to(proxy)

        proxy.cut_after_received(count)  # of +OK\r\n

        assert await ends(link, "SET", "k", "value") is None
        assert proxy.cuts == 1
    assert await redis.get("k") == b"value"


async def test_reply_of_that_number_is_dropped(server: Server, redis: Control) -> None:
    with Proxy(server.url) as proxy:
        link = await to(proxy)

        proxy.drop_reply(3)
        answers = await asyncio.gather(*[ends(link, "APPEND", "k", x) for x in "abcd"])

    assert [answer is not None for answer in answers] == [True, True, False, False]
    assert await redis.get("k") in (b"abc", b"abcd")


async def test_single_bytes_and_delays_change_nothing(server: Server, redis: Control) -> None:
    with Proxy(server.url) as proxy:
        link = await to(proxy)
        proxy.piece, proxy.delay_s = 1, 0.0005

        assert await ends(link, "SET", "k", "value") == b"OK"
        assert await ends(link, "GET", "k") == b"value"
        link.close()


async def test_what_is_held_comes_when_it_is_released(server: Server, redis: Control) -> None:
    with Proxy(server.url) as proxy:
        link = await to(proxy)
        proxy.hold()
        answer = link.ask("SET", "k", "value")
        await redis.ping()
        assert not answer.done() and await redis.get("k") is None

        proxy.release()

        assert await asyncio.wait_for(answer, 10) == b"OK"
        link.close()


async def test_every_connection_may_have_limits_of_its_own(server: Server, redis: Control) -> None:
    fates = iter([Limits(received=200), Limits()])
    with Proxy(server.url) as proxy:
        proxy.cut_each(lambda: next(fates))
        first, second = await to(proxy), await to(proxy)
        await redis.set("k", "v" * 300)

        assert await ends(first, "GET", "k") is None
        assert await ends(second, "GET", "k") == b"v" * 300
        assert proxy.cut() == 1
        await wait_until(second.lost.done)
        assert proxy.accepted == 2
