"""The control connections: how long to wait between attempts, what a dead server looks like, groups."""

import asyncio
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from millstream.broker import control_scripts
from millstream.broker.connection import DOWN, Control, backoff, explained, open_control, ping, run, run_all
from millstream.broker.keys import LANES, DeploymentKeys, Keys
from millstream.broker.link import REFUSED
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError
from tests.helpers import claim, nodes_of, read_everything, seed_queued, wait_until
from tests.servers import Server, free_port

# backoff


def test_waits_double_up_to_the_most_and_stay_there() -> None:
    waits = list(islice(backoff(first_s=0.02, most_s=1.0, seed=1), 30))

    ceilings = [min(1.0, 0.02 * 2**number) for number in range(30)]
    assert all(ceiling / 2 <= wait <= ceiling for wait, ceiling in zip(waits, ceilings, strict=True))


def test_waits_of_two_clients_differ_and_those_of_one_seed_do_not() -> None:
    one, same, other = (list(islice(backoff(seed=seed), 10)) for seed in (1, 1, 2))

    assert one == same
    assert one != other


# ping


@pytest.mark.anyio
async def test_living_server_answers(settings: Settings, redis: Control) -> None:
    await ping(redis, settings)


@pytest.mark.anyio
async def test_dead_server_is_one_line_that_names_it_without_the_password() -> None:
    settings = Settings(f"redis://user:hunter2@127.0.0.1:{free_port()}")
    async with open_control(settings, "test") as client:
        with pytest.raises(BrokerUnavailableError, match=r"redis://\*\*\*@127\.0\.0\.1:\d+: .*is it running") as caught:
            await ping(client, settings)

    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.anyio
async def test_wrong_password_is_one_line_that_asks_for_it(server: Server) -> None:
    private = Server(server.name, "--requirepass", "hunter2").start()
    settings = Settings(f"redis://:wrong-one@127.0.0.1:{private.port}")
    async with open_control(settings, "test") as client:
        with pytest.raises(BrokerUnavailableError, match="is the password right") as caught:
            await ping(client, settings)
    private.stop()

    assert "wrong-one" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.anyio
async def test_lost_server_counts_as_down_and_a_returned_one_answers_again(server: Server) -> None:
    private = Server(server.name).start()
    settings = Settings(private.url)
    async with open_control(settings, "test") as client:
        await ping(client, settings)
        private.kill()
        with pytest.raises(DOWN):
            await client.get("key")
        private.start()

        await ping(client, settings)
    private.stop()


@pytest.mark.anyio
async def test_demoted_server_counts_as_down_for_plain_commands_and_for_those_that_block_in_it(
    start_server: Callable[..., Server],
) -> None:
    server = start_server()
    async with open_control(Settings(server.url), "test") as client, server.connect() as operator:

        async def block() -> None:
            with explained():
                await client.xread({"stream": "$"}, block=10_000)

        blocked = asyncio.create_task(block())
        await wait_until(lambda: is_blocked(operator))

        await operator.replicaof("127.0.0.1", "1")

        with pytest.raises(DOWN):
            await blocked
        with pytest.raises(DOWN):
            await client.hset("hash", "field", "value")


async def is_blocked(operator: Control) -> bool:
    info: Any = await operator.info("clients")
    return int(info["blocked_clients"]) == 1


# several at once


@pytest.mark.anyio
@pytest.mark.on_cluster
async def test_scripts_that_go_out_together_have_each_its_answer(redis: Control, settings: Settings) -> None:
    """Also on a server that does not know them yet, and where it refuses one of them."""
    deployments = [Keys(settings.namespace).deployment(f"app.M{number}") for number in range(4)]
    await redis.set(deployments[2].due, "not a sorted set", ex=10)
    for node in await nodes_of(redis):
        await node.script_flush()

    for _ in range(2):
        answers = await run_all(redis, [control_scripts.sweep(keys) for keys in deployments])

        kinds = [type(answer) for answer in answers]
        assert [kinds[number] for number in (0, 1, 3)] == [control_scripts.Swept] * 3
        assert isinstance(answers[2], REFUSED) and "WRONGTYPE" in str(answers[2])
    await redis.delete(deployments[2].due)


@pytest.mark.anyio
async def test_scripts_that_go_out_together_to_a_server_that_is_away_fail_together(
    start_server: Callable[..., Server],
) -> None:
    server = start_server()
    client = open_control(Settings(server.url), "test")
    call = control_scripts.sweep(Keys("ms").deployment("app.Model"))
    await run_all(client, [call])
    server.kill()

    with pytest.raises(DOWN):
        await run_all(client, [call, call])
    await client.aclose()


# groups


@pytest.mark.anyio
@pytest.mark.fake
async def test_groups_read_each_lane_from_its_beginning(redis: Control, keys: DeploymentKeys) -> None:
    await redis.hset(keys.config, "max_attempts", 3)
    refs = [ref for lane in LANES for ref in await seed_queued(redis, keys, lane=lane)]

    await run(redis, control_scripts.groups(keys))

    assert [one.ref for one in await claim(redis, keys, 10)] == refs


@pytest.mark.anyio
@pytest.mark.fake
async def test_groups_made_twice_are_as_made_once(redis: Control, keys: DeploymentKeys) -> None:
    await run(redis, control_scripts.groups(keys))
    await redis.hset(keys.config, "max_attempts", 3)
    await seed_queued(redis, keys, 2)
    await claim(redis, keys)
    before = await read_everything(redis)

    await run(redis, control_scripts.groups(keys))

    assert await read_everything(redis) == before


@pytest.mark.anyio
async def test_other_errors_than_an_existing_group_are_raised(redis: Control, keys: DeploymentKeys) -> None:
    await redis.set(keys.lane("normal"), "not a stream", ex=10)

    with pytest.raises(Exception, match="WRONGTYPE"):
        await run(redis, control_scripts.groups(keys))
    await redis.delete(*keys.lanes)
