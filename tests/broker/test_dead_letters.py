"""Dead letters: kept within bounds, looked at, sent again and dropped."""

import json
from typing import Any

import pytest

from millstream.broker import control_scripts, dead_letters, scripts
from millstream.broker.connection import Control, run
from millstream.broker.dead_letters import DeadLetter
from millstream.broker.keys import DeploymentKeys
from millstream.broker.registry import Registry
from millstream.broker.scripts import Requeued
from millstream.broker.states import State
from millstream.config import Settings
from millstream.errors import DeploymentNotFoundError
from tests.helpers import (
    BODY,
    REPLICA,
    Claimed,
    asking,
    claim,
    deploy_config,
    finish,
    now_ms,
    read_everything,
    read_result,
    read_state,
    request,
    seed_running,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake]

WEEK_MS = 7 * 24 * 3600 * 1000


@pytest.fixture
def registry(redis: Control) -> Registry:
    return Registry(redis, Settings("redis://unused", secret_key=b"secret"))


async def bury(
    redis: Control, keys: DeploymentKeys, count: int = 1, *, extras: str = "", lane: str = "low"
) -> list[Claimed]:
    """Requests whose only attempt ended with a death."""
    await deploy_config(redis, keys, max_attempts=1)
    attempts = await seed_running(redis, keys, count, lane=lane, extras=extras)
    await release(redis, keys, lane)
    return attempts


async def release(redis: Control, keys: DeploymentKeys, lane: str) -> None:
    while (await run(redis, scripts.release(keys, lane, REPLICA, "killed by signal 9", expired=False))).more:
        pass


async def read_letters(registry: Registry) -> list[DeadLetter]:
    return [letter async for letter in dead_letters.letters(registry, "app.Model")]


async def test_letters_are_listed_latest_first(redis: Control, keys: DeploymentKeys, registry: Registry) -> None:
    attempts = await bury(redis, keys, 250)

    letters = await read_letters(registry)

    assert [letter.ref_id for letter in letters] == [f"app.Model~{one.ref}" for one in reversed(attempts)]
    latest = letters[0]
    assert (latest.method, latest.lane, latest.attempt, latest.size_bytes) == ("__call__", "low", 1, len(BODY))
    assert latest.reason == "killed by signal 9" and latest.history[0]["replica"] == REPLICA
    assert abs(latest.died_ms - await now_ms(redis)) < 60_000


async def test_letter_is_found_by_its_id_and_by_its_ref(
    redis: Control, keys: DeploymentKeys, registry: Registry
) -> None:
    await bury(redis, keys, 3)
    _, letter, _ = await read_letters(registry)

    assert await dead_letters.find(registry, letter.id) == letter
    assert await dead_letters.find(registry, letter.ref_id) == letter
    assert await dead_letters.find(registry, "app.Model/1-1") is None
    assert await dead_letters.find(registry, "app.Model~" + "z" * 22) is None
    for name in ("nonsense", "app.Model/x", "app.Model/1"):
        with pytest.raises(ValueError, match="is n"):
            await dead_letters.find(registry, name)


async def test_requeued_request_is_as_it_was_with_attempts_from_one(
    redis: Control, keys: DeploymentKeys, registry: Registry
) -> None:
    (one,) = await bury(redis, keys, extras=asking(kill=1, attempts=1, timeout_ms=60_000))
    await redis.zrem(keys.deadlines, one.ref)
    (letter,) = await read_letters(registry)

    assert await dead_letters.requeue(registry, [letter]) == {letter.id: Requeued.QUEUED}

    assert await read_state(redis, keys, one.ref) == State.QUEUED
    assert await redis.xlen(keys.dead) == 0
    (again,) = await claim(redis, keys, replica="r-2")
    history = json.loads(again.fields.pop(b"history"))
    assert [ended["attempt"] for ended in history] == [1]
    assert again.lane == "low"
    del one.fields[b"deadline"]  # it has had its time: whoever sends it again wants it to run
    assert again.fields == one.fields
    await finish(redis, keys, again)
    assert await read_state(redis, keys, one.ref) == State.SUCCEEDED


async def test_requeued_request_that_dies_again_is_buried_with_all_its_history(
    redis: Control, keys: DeploymentKeys, registry: Registry
) -> None:
    (one,) = await bury(redis, keys)
    await dead_letters.requeue(registry, await read_letters(registry))
    await claim(redis, keys)

    await release(redis, keys, "low")

    (letter,) = await read_letters(registry)
    assert letter.ref_id == f"app.Model~{one.ref}"
    assert [ended["attempt"] for ended in letter.history] == [1, 1]


async def test_second_requeue_is_told_gone_and_changes_nothing(
    redis: Control, keys: DeploymentKeys, registry: Registry
) -> None:
    await bury(redis, keys, 150)
    letters = await read_letters(registry)
    first = await dead_letters.requeue(registry, letters)
    before = await read_everything(redis)

    second = await dead_letters.requeue(registry, letters)

    assert set(first.values()) == {Requeued.QUEUED} and len(first) == 150
    assert set(second.values()) == {Requeued.GONE}
    assert await read_everything(redis) == before


async def test_letter_whose_ref_is_used_anew_stays(redis: Control, keys: DeploymentKeys, registry: Registry) -> None:
    """The result of a dead letter has a TTL; after that an idempotency key may bring the same ref id again."""
    (one,) = await bury(redis, keys)
    (letter,) = await read_letters(registry)
    await redis.delete(keys.result(one.ref))
    await run(redis, scripts.submit(keys, "caller", request(one.ref)))

    while_open = await dead_letters.requeue(registry, [letter])
    (again,) = await claim(redis, keys)
    await finish(redis, keys, again)
    after = await dead_letters.requeue(registry, [letter])

    assert (while_open, after) == ({letter.id: Requeued.OPEN}, {letter.id: Requeued.ENDED})
    assert await read_letters(registry) == [letter]


async def test_large_arguments_are_kept_and_go_with_the_end(
    redis: Control, keys: DeploymentKeys, registry: Registry
) -> None:
    ref = "p" * 22
    await deploy_config(redis, keys, max_attempts=1)
    await redis.rpush(keys.payload(ref), b"pieces")
    await run(redis, scripts.submit(keys, "caller", request(ref, lane="low", extras=asking(payload=6), body=b"")))
    await claim(redis, keys)
    await release(redis, keys, "low")
    (letter,) = await read_letters(registry)
    assert letter.size_bytes == -1
    assert 0 < await redis.pttl(keys.payload(ref)) <= WEEK_MS

    await dead_letters.requeue(registry, [letter])

    assert await redis.ttl(keys.payload(ref)) == -1
    (again,) = await claim(redis, keys)
    await finish(redis, keys, again)
    assert not await redis.exists(keys.payload(ref))


async def test_letter_whose_large_arguments_have_expired_cannot_be_sent(
    redis: Control, keys: DeploymentKeys, registry: Registry
) -> None:
    ref = "q" * 22
    await deploy_config(redis, keys, max_attempts=1)
    await redis.rpush(keys.payload(ref), b"pieces")
    await run(redis, scripts.submit(keys, "caller", request(ref, lane="low", extras=asking(payload=6), body=b"")))
    await claim(redis, keys)
    await release(redis, keys, "low")
    await redis.delete(keys.payload(ref))
    (letter,) = await read_letters(registry)

    assert await dead_letters.requeue(registry, [letter]) == {letter.id: Requeued.MISSING}
    assert await read_letters(registry) == [letter]


async def test_what_is_no_request_cannot_be_sent_and_can_be_dropped(
    redis: Control, keys: DeploymentKeys, registry: Registry
) -> None:
    await deploy_config(redis, keys)
    await redis.xadd(keys.lane("low"), {"written": "by hand"})
    await run(redis, scripts.claim(keys, REPLICA, 5))
    await release(redis, keys, "low")
    (letter,) = await read_letters(registry)

    assert letter.ref_id == "" and await dead_letters.find(registry, letter.id) == letter
    assert await dead_letters.requeue(registry, [letter]) == {letter.id: Requeued.UNUSABLE}
    assert await dead_letters.drop(registry, [letter]) == 1
    assert await read_letters(registry) == []


async def test_requeue_into_a_deleted_deployment_is_refused_and_loses_nothing(
    redis: Control, keys: DeploymentKeys, registry: Registry
) -> None:
    await bury(redis, keys)
    letters = await read_letters(registry)
    await redis.rename(keys.config, keys.definition)

    with pytest.raises(DeploymentNotFoundError):
        await dead_letters.requeue(registry, letters)
    assert await read_letters(registry) == letters
    await redis.rename(keys.definition, keys.config)


async def test_dropped_letters_are_gone_with_their_arguments_and_their_results_stay(
    redis: Control, keys: DeploymentKeys, registry: Registry
) -> None:
    one, other = await bury(redis, keys, 2)
    await redis.xadd(keys.dead, {"ref": "r" * 22, "method": "m", "body": "", "payload": "6"})
    await redis.rpush(keys.payload("r" * 22), b"pieces")
    letters = await read_letters(registry)

    assert await dead_letters.drop(registry, letters[:2]) == 2
    assert await dead_letters.drop(registry, letters[:2]) == 0

    assert not await redis.exists(keys.payload("r" * 22))
    assert [letter.ref_id for letter in await read_letters(registry)] == [f"app.Model~{one.ref}"]
    assert await read_result(redis, keys, other.ref) is not None


async def test_arguments_that_a_new_request_uses_are_not_dropped(
    redis: Control, keys: DeploymentKeys, registry: Registry
) -> None:
    (one,) = await bury(redis, keys)
    await redis.xadd(keys.dead, {"ref": one.ref, "method": "m", "body": "", "payload": "6"})
    await redis.rpush(keys.payload(one.ref), b"pieces")
    await redis.delete(keys.result(one.ref))
    await run(redis, scripts.submit(keys, "caller", request(one.ref, extras=asking(payload=6), body=b"")))

    await dead_letters.drop(registry, await read_letters(registry))

    assert await redis.exists(keys.payload(one.ref))


# bounds


async def test_letters_older_than_a_week_fall_out_and_are_counted(
    redis: Control, keys: DeploymentKeys, registry: Registry
) -> None:
    await deploy_config(redis, keys)
    now = await now_ms(redis)
    for at_ms in (now - WEEK_MS - 60_000, now - WEEK_MS - 50_000, now - WEEK_MS + 60_000):
        await redis.xadd(keys.dead, {"ref": "x" * 22}, id=f"{at_ms}-0")

    for _ in range(2):
        await run(redis, control_scripts.sweep(keys))

    assert [letter.died_ms for letter in await read_letters(registry)] == [now - WEEK_MS + 60_000]
    assert await registry.dead_dropped("app.Model") == 2


async def test_more_than_ten_thousand_fall_out_and_are_counted(
    redis: Control, keys: DeploymentKeys, registry: Registry
) -> None:
    await deploy_config(redis, keys, max_attempts=1)
    now = await now_ms(redis)
    async with redis.pipeline(transaction=False) as pipe:
        for number in range(10_000):
            pipe.xadd(keys.dead, {"ref": "x" * 22}, id=f"{now - 60_000}-{number}")
        await pipe.execute()
    (one,) = await seed_running(redis, keys)

    await release(redis, keys, "normal")

    letters: Any = await redis.xrevrange(keys.dead, count=1)
    assert await registry.dead_count("app.Model") == 10_000
    assert letters[0][1][b"ref"] == one.ref.encode()
    assert await registry.dead_dropped("app.Model") == 1
