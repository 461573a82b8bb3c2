"""The broker on a Redis Cluster: both transports find every slot, and find it again when it has moved."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis.exceptions
from redis.crc import key_slot

from millstream.broker import cluster as cluster_module
from millstream.broker import control_scripts, scripts
from millstream.broker.bulk import Bulk
from millstream.broker.cluster import ClusterLink, SlotMap, dial, dial_everywhere, read_map, seeds
from millstream.broker.connection import DOWN, Control, open_control, ping, run, run_all
from millstream.broker.keys import LANES, DeploymentKeys
from millstream.broker.leaks import find_leaks
from millstream.broker.link import Link
from millstream.broker.registry import Registry
from millstream.broker.scripts import Ended, Submitted
from millstream.broker.sweeper import Sweeper
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError, ConfigError
from tests.access import make_user
from tests.broker.raw import Raw
from tests.cluster import Cluster
from tests.helpers import new_ref, request, wait_until
from tests.servers import AnyServer, Server, free_port

pytestmark = [pytest.mark.anyio, pytest.mark.any_server]
SECRET = b"a secret for tests"
PRIMARIES = 3


@pytest.fixture(scope="module")
def shared(server: AnyServer) -> Iterator[Cluster]:
    cluster = Cluster(server.name)
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture
def cluster(shared: Cluster) -> Cluster:
    shared.flush()
    return shared


@pytest.fixture
def settings(cluster: Cluster) -> Settings:
    return Settings(cluster.url, secret_key=SECRET)


@pytest.fixture
async def link(settings: Settings) -> AsyncIterator[Link]:
    link = await dial_everywhere(settings, "test")
    yield link
    link.close()


@pytest.fixture
async def control(settings: Settings) -> AsyncIterator[Control]:
    async with open_control(settings, "test") as control:
        yield control


def tags(count: int = 48) -> list[str]:
    """Of deployments all over the slots."""
    wanted, found = set(range(count)), list[str]()
    for number in itertools.count():
        tag = f"app.Model{number}"
        share = key_slot(f"ms:{tag}".encode()) * count // 16384
        if share in wanted:
            wanted.discard(share)
            found.append(tag)
        if not wanted:
            return found
    return found


async def deploy(control: Control, tag: str) -> DeploymentKeys:
    keys = DeploymentKeys("ms", tag)
    await run(control, control_scripts.groups(keys))
    await control.hset(keys.config, mapping={"max_attempts": 3, "result_ttl_s": 60, "version": "v", "config": "{}"})
    return keys


# URLs and maps


def test_nodes_of_a_url_have_its_credentials_and_options() -> None:
    assert seeds("rediss+cluster://user:p@ss@a:1,b:2/0?ssl_cert_reqs=none") == [
        "rediss://user:p@ss@a:1?ssl_cert_reqs=none",
        "rediss://user:p@ss@b:2?ssl_cert_reqs=none",
    ]


@pytest.mark.parametrize("url", ["redis+cluster://", "redis+cluster://a:1/3", "redis+cluster://:pw@"])
def test_url_without_hosts_or_with_a_database_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        Settings(url)


def test_map_says_which_node_has_a_key_and_which_slot_nobody_has() -> None:
    rows = [[0, 8000, [b"10.0.0.1", 7000, b"id"], [b"10.0.0.9", 7009, b"id"]], [8001, 16382, [b"", 7001, b"id"]]]

    slots = read_map("redis+cluster://:pw@seed:1", "redis://:pw@asked:7001", rows)

    assert slots.urls == ["redis://:pw@10.0.0.1:7000", "redis://:pw@asked:7001"]
    assert slots.url_of("{b}") == "redis://:pw@10.0.0.1:7000"  # slot 3300
    with pytest.raises(BrokerUnavailableError, match="no node of the cluster has slot"):
        SlotMap(()).url_of("b")


@pytest.mark.single_server
async def test_server_that_is_no_cluster_is_one_clear_error(server: Server) -> None:
    settings = Settings(f"redis+cluster://127.0.0.1:{server.port}")

    with pytest.raises(BrokerUnavailableError, match="cluster support disabled"):
        await dial_everywhere(settings, "test")


async def test_cluster_that_is_away_is_one_clear_error() -> None:
    settings = Settings(f"redis+cluster://:hunter2@127.0.0.1:{free_port()},127.0.0.1:{free_port()}")

    with pytest.raises(BrokerUnavailableError, match="cannot reach the server") as caught:
        await dial_everywhere(settings, "test")
    async with open_control(settings, "test") as control:
        with pytest.raises(BrokerUnavailableError, match="cannot reach the server"):
            await ping(control, settings)

    assert "hunter2" not in str(caught.value)


async def test_a_seed_that_is_gone_is_passed_over(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "_seen", {})
    settings = Settings(f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{cluster.nodes[4].port}")

    link = await dial_everywhere(settings, "test")

    assert link.is_up
    link.close()


async def test_user_needs_one_right_more_than_without_a_cluster(cluster: Cluster) -> None:
    for node in cluster.nodes:
        url = make_user(node, "ms-caller")
    settings = Settings(url.replace("redis://", "redis+cluster://"))
    with pytest.raises(ConfigError, match=r"NOPERM .*'cluster\|slots'"):
        await dial_everywhere(settings, "test")

    for node in cluster.nodes:
        with node.connect_blocking() as client:
            client.acl_setuser("ms-caller", enabled=True, commands=["+cluster|slots"])
    link = await dial_everywhere(settings, "test")
    async with open_control(settings, "test") as control:
        await ping(control, settings)

    assert link.is_up
    link.close()


# all slots


async def test_requests_run_in_every_part_of_the_slots(link: Link, control: Control) -> None:
    for tag in tags():
        keys, ref = await deploy(control, tag), new_ref()

        assert await link.run(scripts.submit(keys, "caller", request(ref))) == {}
        assert await link.run(scripts.submit(keys, "caller", request(ref))) == {0: Submitted.OPEN}
        _, ((lane, ((entry, _),)),) = await link.run(scripts.claim(keys, "r-1", 1))
        outcome = [entry, ref, "caller", "succeeded", b"a value"]
        await link.run(scripts.finish(keys, "normal", 60, outcome))

        assert lane == keys.lane("normal").encode()
        stored: Any = await control.get(keys.result(ref))
        assert stored.endswith(b"\na value")
        assert (await run(control, control_scripts.backlog(keys))).waiting == 0


async def test_cancelled_held_and_swept_in_every_part_of_the_slots(
    link: Link, control: Control, settings: Settings
) -> None:
    sweeper = Sweeper(settings, lambda call: run(control, call), control.execute_command)
    for tag in tags(12):
        keys, later, never = await deploy(control, tag), new_ref(), new_ref()

        for ref, delay_ms in ((later, 1), (never, 60_000)):
            held = scripts.hold(keys, "", ref.encode(), "low", b"m", b"body", delay_ms=delay_ms)
            assert await link.run(held) is Submitted.NEW
        (answer,), _ = await link.run(scripts.cancel(keys, 60, "why", [never]))

        async def is_queued(keys: DeploymentKeys = keys) -> bool:
            await sweeper.step(keys.tag)
            return await control.xlen(keys.lane("low")) == 1

        assert answer[0] is Ended.ENDED
        await wait_until(is_queued)


async def test_link_has_ended_when_its_connections_to_all_nodes_have(link: Link) -> None:
    ends = link.ends()

    link.finish()
    await asyncio.wait_for(asyncio.wait(ends), 5)

    assert len(ends) == PRIMARIES


async def test_messages_come_from_every_part_of_the_slots(settings: Settings) -> None:
    heard: list[bytes] = []
    replies = await dial_everywhere(settings, "test", heard.append)
    for tag in tags(12):
        channel = DeploymentKeys("ms", tag).reply("me")
        await replies.ask("SSUBSCRIBE", channel)
        near = await dial(settings, "test", near=channel)
        await near.ask("SPUBLISH", channel, tag)
        near.close()

    await wait_until(lambda: len(heard) == 12)

    assert [text.decode() for text in heard] == tags(12)
    replies.close()


async def test_large_values_go_to_every_part_of_the_slots(settings: Settings) -> None:
    bulk, value = Bulk(settings, "test", patience_s=1), b"0123456789" * 100_000
    for tag in tags(12):
        keys = DeploymentKeys("ms", tag)
        key = keys.value(new_ref(), "-")

        await bulk.write(keys, key, Raw(value), 10_000)
        read = await bulk.read(key, len(value), Raw)

        assert read is not None and bytes(read) == value
    bulk.close()


async def test_streams_of_several_slots_are_waited_for_at_once(control: Any) -> None:
    lanes = [DeploymentKeys("ms", tag).lane("normal") for tag in tags(12)]
    waiting = asyncio.create_task(control.xread(dict.fromkeys([*lanes, "ms:changes"], "0-0"), block=5000))

    await asyncio.sleep(0.05)
    await control.xadd(lanes[7], {"a": "b"})

    ((name, _),) = await asyncio.wait_for(waiting, 10)
    assert name.decode() == lanes[7]
    assert not await control.xread(dict.fromkeys(lanes[:3], "0-0"), block=20)


async def test_registry_reads_and_writes_what_is_all_over_the_cluster(control: Control, settings: Settings) -> None:
    registry: Any = Registry(control, settings)

    await registry.check_secret()
    await registry.announce("something")

    assert await registry.apps() == {}
    assert await registry.nodes() == {}
    assert await registry.now_ms() > 0


async def test_all_nodes_are_looked_through_for_keys_without_owner(control: Control, settings: Settings) -> None:
    lost = sorted(f"{DeploymentKeys('ms', tag).prefix}lost" for tag in tags(12))
    for key in lost:
        await control.set(key, "of nobody")

    leaks = await find_leaks(Registry(control, settings))

    assert sorted(leaks.keys) == lost
    assert leaks.looked_at == 12


# when slots move


async def test_link_to_a_slot_that_has_moved_is_lost_and_a_new_one_finds_it(
    cluster: Cluster, settings: Settings, control: Control
) -> None:
    keys = await deploy(control, tags()[5])
    link, alone = await dial_everywhere(settings, "test"), await dial(settings, "test", near=keys.prefix)
    ref = new_ref()
    await link.run(scripts.submit(keys, "caller", request(ref)))

    await asyncio.to_thread(cluster.move, keys.open)

    for old in (link, alone):
        with pytest.raises(BrokerUnavailableError):
            await old.run(scripts.submit(keys, "caller", request(ref)))
        await asyncio.wait_for(old.lost, 5)
    link, alone = await dial_everywhere(settings, "test"), await dial(settings, "test", near=keys.prefix)
    for new in (link, alone):
        assert await new.run(scripts.submit(keys, "caller", request(ref))) == {0: Submitted.OPEN}
        new.close()
    assert (await run(control, control_scripts.backlog(keys))).waiting == 1


async def test_who_listens_to_a_channel_that_has_moved_loses_the_link(cluster: Cluster, settings: Settings) -> None:
    channel = DeploymentKeys("ms", tags()[11]).reply("me")
    alone = await dial(settings, "test", lambda message: None, near=channel)
    await alone.ask("SSUBSCRIBE", channel)

    await asyncio.to_thread(cluster.move, channel)

    await asyncio.wait_for(alone.lost, 10)


async def test_link_is_lost_when_another_map_is_in_force_though_nothing_is_sent(
    cluster: Cluster, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "WATCH_S", 0.05)
    link = await dial_everywhere(settings, "test")
    await asyncio.sleep(0.3)
    assert isinstance(link, ClusterLink) and link.is_up

    await asyncio.to_thread(cluster.move, f"{{ms:{tags()[17]}}}:open")

    await asyncio.wait_for(link.lost, 10)
    assert not link.is_up


async def test_control_client_follows_a_slot_that_has_moved(cluster: Cluster, control: Control) -> None:
    keys = await deploy(control, tags()[23])

    await asyncio.to_thread(cluster.move, keys.open)

    async with control.pipeline(transaction=False) as pipe:
        pipe.hget(keys.config, "version")
        pipe.xlen(keys.lane(LANES[0]))
        with pytest.raises(redis.exceptions.RedisError) as caught:
            await pipe.execute()
    assert isinstance(caught.value, DOWN)  # who has a loop of its own comes again
    assert await control.hget(keys.config, "version") == b"v"

    await asyncio.to_thread(cluster.move, keys.open)

    with pytest.raises(DOWN):  # where errors are among the replies, this is no such error
        await run_all(control, [control_scripts.sweep(keys)])
    assert await run(control, control_scripts.sweep(keys))  # alone, it looks for the slot itself
