"""The hot transport on real servers: order, messages in between, and what happens when the connection goes."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import hiredis
import pytest
import redis.exceptions

from millstream.broker import cluster
from millstream.broker import link as link_module
from millstream.broker.cluster import dial_everywhere
from millstream.broker.connection import Control
from millstream.broker.keys import DeploymentKeys
from millstream.broker.link import Link, Messages, dial, explain
from millstream.config import Settings
from millstream.errors import BackPressureError, BrokerUnavailableError, RefNotFoundError
from tests.helpers import deploy_config, finish, node_of, seed_running, wait_until
from tests.servers import Server, free_port

pytestmark = pytest.mark.anyio
HOME = "{ms:here}:"  # in a cluster, its node takes the commands without a key


@pytest.fixture
async def link(settings: Settings) -> AsyncIterator[Link]:
    link = await dial_everywhere(settings, "test-link", near=HOME)
    yield link
    link.close()
    await link.lost


def collect(link: Link, *command: Any, into: list[Any]) -> None:
    link.send(into.append, *command)


async def kill(redis: Control, link: Link) -> None:
    """Cut the connection from the server's side."""
    await (await node_of(redis, HOME)).client_kill_filter(_id=str(link.client_id))
    await link.lost


# commands


async def test_replies_come_in_the_order_of_the_commands(link: Link) -> None:
    replies: list[Any] = []

    for number in range(1000):
        collect(link, "ECHO", str(number), into=replies)
    await link.ask("PING")

    assert replies == [str(number).encode() for number in range(1000)]


async def test_commands_that_are_held_go_out_together_and_in_order(settings: Settings) -> None:
    link = await cluster.dial(settings, "test-link", near=HOME)
    replies: list[Any] = []

    link.hold()
    for number in range(10):
        collect(link, "ECHO", str(number), into=replies)
    await asyncio.sleep(0.01)
    assert replies == []
    link.let_go()
    await link.ask("PING")

    assert replies == [str(number).encode() for number in range(10)]
    link.close()


async def test_error_goes_to_its_own_command_only(link: Link) -> None:
    replies: list[Any] = []

    collect(link, "ECHO", "before", into=replies)
    collect(link, "NO-SUCH-COMMAND", into=replies)
    collect(link, "ECHO", "after", into=replies)
    await link.ask("PING")

    assert [replies[0], replies[2]] == [b"before", b"after"]
    assert isinstance(replies[1], hiredis.ReplyError)


async def test_ask_raises_what_the_server_refuses(link: Link) -> None:
    with pytest.raises(hiredis.ReplyError, match="unknown command"):
        await link.ask("NO-SUCH-COMMAND")


async def test_large_and_binary_values_pass_unchanged(link: Link) -> None:
    value = bytes(range(256)) * 20_000

    await link.ask("SET", HOME + "large", value, "EX", 10)

    assert await link.ask("GET", HOME + "large") == value


async def test_reply_to_a_cancelled_question_is_dropped(link: Link) -> None:
    question = link.ask("ECHO", "first")
    question.cancel()

    assert await link.ask("ECHO", "second") == b"second"


async def test_messages_come_between_replies_and_disturb_none(
    settings: Settings, redis: Control, keys: DeploymentKeys
) -> None:
    messages: list[bytes] = []
    link = await dial_everywhere(settings, "test-link", messages.append, near=keys.prefix)
    await deploy_config(redis, keys)
    attempts = await seed_running(redis, keys, 20)
    await link.ask("SSUBSCRIBE", keys.reply("caller"))
    replies: list[Any] = []

    for number, one in enumerate(attempts):
        collect(link, "PING", str(number), into=replies)
        await finish(redis, keys, one)
    await wait_until(lambda: len(messages) == len(replies) == 20)

    assert replies == [[b"pong", str(number).encode()] for number in range(20)]
    assert [one.ref.encode() in message for one, message in zip(attempts, messages, strict=True)] == [True] * 20
    link.close()


# losing it


async def test_command_in_flight_hears_that_the_connection_was_lost(link: Link, redis: Control) -> None:
    replies: list[Any] = []
    collect(link, "BLPOP", HOME + "nothing", 0, into=replies)
    collect(link, "PING", into=replies)

    await kill(redis, link)

    assert [type(reply) for reply in replies] == [BrokerUnavailableError] * 2
    assert not link.is_up


async def test_question_in_flight_raises_that_the_connection_was_lost(link: Link, redis: Control) -> None:
    question = link.ask("BLPOP", HOME + "nothing", 0)

    await kill(redis, link)

    with pytest.raises(BrokerUnavailableError, match="was lost"):
        await question


async def test_command_on_a_lost_link_is_answered_at_once(link: Link, redis: Control) -> None:
    await kill(redis, link)
    replies: list[Any] = []

    collect(link, "PING", into=replies)

    assert [type(reply) for reply in replies] == [BrokerUnavailableError]
    with pytest.raises(BrokerUnavailableError, match="is down"):
        await link.ask("PING")


async def test_closing_answers_what_is_pending_and_twice_is_as_once(link: Link) -> None:
    replies: list[Any] = []
    collect(link, "BLPOP", HOME + "nothing", 0, into=replies)

    link.close()
    link.close()
    await link.lost

    assert [type(reply) for reply in replies] == [BrokerUnavailableError]


@pytest.mark.single_server
async def test_link_notices_the_death_of_its_server(server: Server) -> None:
    private = Server(server.name).start()
    link = await dial(Settings(private.url), "test-link")
    question = link.ask("BLPOP", HOME + "nothing", 0)

    private.kill()

    with pytest.raises(BrokerUnavailableError, match="was lost"):
        await question
    private.stop()


# dialling


async def test_connection_bears_its_name_and_knows_its_id(link: Link, redis: Control) -> None:
    clients: Any = await (await node_of(redis, HOME)).client_list()

    named = [client for client in clients if int(client["id"]) == link.client_id]

    assert [client["name"] for client in named] == ["test-link"]


@pytest.mark.single_server
async def test_unix_socket_and_database_number_are_understood(server: Server) -> None:
    link = await dial(Settings(server.unix_url + "?db=3"), "test")

    info = await link.ask("CLIENT", "INFO")

    assert b" db=3 " in info and b"/socket" in info
    link.close()


async def test_dead_port_is_named_without_the_password() -> None:
    port = free_port()

    with pytest.raises(BrokerUnavailableError, match=f"127.0.0.1:{port}") as caught:
        await dial(Settings(f"redis://user:hunter2@127.0.0.1:{port}"), "test")

    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_server_that_accepts_and_never_answers_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "CONNECT_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]

        with pytest.raises(BrokerUnavailableError, match="no answer"):
            await dial(Settings(f"redis://:hunter2@127.0.0.1:{port}"), "test")


async def test_machine_that_stood_still_while_it_connected_tries_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, tries = link_module.connect, list[str]()

    async def connect(url: str, *rest: Any) -> Link:
        tries.append(url)
        if len(tries) == 1:
            raise TimeoutError
        return await original(url, *rest)

    monkeypatch.setattr(link_module, "connect", connect)

    link = await dial(Settings(server.url), "test")

    assert await link.ask("PING") == b"PONG"
    assert tries == [server.url] * 2
    link.close()


@pytest.mark.parametrize("passes", range(4))
async def test_whoever_is_cancelled_while_a_connection_comes_about_is_cancelled_at_any_moment(
    link: Link, settings: Settings, passes: int
) -> None:
    comes_about = asyncio.get_running_loop().create_future()

    async def connecting() -> Link:
        await comes_about
        return link

    async def live() -> None:
        await link_module.in_time(settings, connecting)
        await asyncio.Event().wait()

    life = asyncio.create_task(live())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    comes_about.set_result(None)
    for _ in range(passes):
        await asyncio.sleep(0)
    life.cancel()

    await asyncio.wait([life], timeout=2)
    assert life.cancelled()


async def test_something_that_is_no_redis_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer_http, "127.0.0.1", 0) as stranger:
        port = stranger.sockets[0].getsockname()[1]

        with pytest.raises(BrokerUnavailableError):
            await dial(Settings(f"redis://127.0.0.1:{port}"), "test")


@pytest.mark.parametrize("credentials", ["guest:wrong-one@", "stranger:hunter2@"])
async def test_wrong_credentials_are_reported_without_the_password(
    server: Server, redis: Control, credentials: str
) -> None:
    await redis.acl_setuser("guest", enabled=True, passwords="+hunter2", keys="*", categories=["+@all"])

    with pytest.raises(BrokerUnavailableError, match="is the password right") as caught:
        await dial_everywhere(Settings(server.url.replace("://", f"://{credentials}")), "test")

    assert credentials.split(":")[1].rstrip("@") not in str(caught.value)
    await redis.acl_deluser("guest")


async def test_right_credentials_are_used(server: Server, redis: Control) -> None:
    await redis.acl_setuser("guest", enabled=True, passwords="+hun/ter2", keys="*", categories=["+@all"])

    link = await dial_everywhere(Settings(server.url.replace("://", "://guest:hun%2Fter2@")), "test")

    assert await link.ask("ACL", "WHOAMI") == b"guest"
    link.close()
    await redis.acl_deluser("guest")


# explain

OOM = "OOM command not allowed when used memory > 'maxmemory'."


@pytest.mark.parametrize("reply", [hiredis.ReplyError(OOM), redis.exceptions.OutOfMemoryError(OOM[4:])])
def test_full_server_is_back_pressure(reply: Exception) -> None:
    assert type(explain(reply)) is BackPressureError


@pytest.mark.parametrize(
    "reply",
    [
        hiredis.ReplyError("LOADING Redis is loading the dataset in memory"),
        hiredis.ReplyError("READONLY You can't write against a read only replica."),
        hiredis.ReplyError("MASTERDOWN Link with MASTER is down"),
        hiredis.ReplyError("CLUSTERDOWN The cluster is down"),
        redis.exceptions.ReadOnlyError("You can't write against a read only replica."),
        redis.exceptions.MasterDownError("Link with MASTER is down"),
        redis.exceptions.ClusterDownError("The cluster is down"),
    ],
)
def test_server_that_cannot_now_is_unavailable(reply: Exception) -> None:
    assert type(explain(reply)) is BrokerUnavailableError


@pytest.mark.parametrize("reply", [hiredis.ReplyError("ERR syntax error"), RefNotFoundError("ours already")])
def test_everything_else_is_passed_on_as_it_is(reply: Exception) -> None:
    assert explain(reply) is reply


@pytest.mark.parametrize(
    "text",
    [
        b"*2\r\n*999999999\r\n",
        b"*999999\r\n",
        b"*99999999999\r\n",
        b"*2\r\n%999999999\r\n",
        b"*2\r\n$1\r\na\r\n*9999999\r\n",
    ],
)
def test_message_that_announces_more_than_it_has_is_not_believed(text: bytes) -> None:
    assert Messages().read(text) == []


@pytest.mark.parametrize("value", [b"\r\n* a list\r\n* in a text", b"\r\n", b"*2\r\n", b"\r\n%", b""])
def test_message_may_hold_what_looks_like_another(value: bytes) -> None:
    items = [b"r" * 22, value, b"s" * 22, b"a value"]
    text = b"*4\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(item), item) for item in items)

    assert Messages().read(text) == items
