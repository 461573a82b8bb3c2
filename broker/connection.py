"""Connections for everything but the hot path, over redis-py: control plane, autoscaler, dashboard, CLI."""

import asyncio
import logging
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from millstream.broker.call import Call
from millstream.broker.cluster_control import ClusterControl
from millstream.broker.link import CANNOT_NOW, CONNECT_TIMEOUT_S, REFUSED, cannot_reach, explain, foreign
from millstream.config import Settings
from millstream.errors import BrokerUnavailableError, ConfigError

T = TypeVar("T")
Control = redis.asyncio.Redis

PING_TIMEOUT_S = 2 * CONNECT_TIMEOUT_S  # the client's own tries would add up to four times as long

# What counts as "the server is down", as opposed to "the server said no".
DOWN = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, BrokerUnavailableError, *CANNOT_NOW)
NO_RIGHT = (ConfigError, redis.exceptions.NoPermissionError)  # it will say no again: whoever needs it cannot work
ANY_TROUBLE = (
    redis.exceptions.RedisError,
    BrokerUnavailableError,
    *REFUSED,
    ConfigError,
)  # down, or no: NOPERM, an unknown command, ...


def open_control(settings: Settings, name: str) -> Control:
    """A lazy client; nothing is sent yet. Close it with `aclose()`.

    redis-py 8 repeats every command 10 times by default. Ours repeats a few times, quickly: all that goes this way is
    idempotent, and loops have a backoff of their own.
    """
    # Longer than any blocking read. In a cluster, another node may answer in place of one that does not: tried at once.
    timeout_s, retries = (2.5, 0) if settings.is_cluster else (10.0, 3)

    def open_node(url: str) -> Control:
        return redis.asyncio.Redis.from_url(
            url,
            protocol=2,
            client_name=name,
            socket_connect_timeout=5.0,
            socket_timeout=timeout_s,
            retry=Retry(ExponentialBackoff(cap=0.2, base=0.02), retries),
            retry_on_error=[redis.exceptions.ConnectionError],
        )

    return ClusterControl(settings, open_node) if settings.is_cluster else open_node(settings.url)


async def run(client: Control, call: Call[T]) -> T:
    """Carry out one script. Raises as `explain` and redis-py do."""
    with explained():
        try:
            reply = await client.evalsha(call.script.sha.decode(), len(call.keys), *call.keys, *call.arguments)
        except redis.exceptions.NoScriptError:
            reply = await client.eval(call.script.source.decode(), len(call.keys), *call.keys, *call.arguments)
    return _answer(call, reply)


async def run_all(client: Control, calls: Sequence[Call[T]]) -> list[T | Exception]:
    """Carry out scripts that go out together: the answer of each, or one of REFUSED. Raises whatever else `run` does.

    For very many, one after the other: a round trip of redis-py costs several times what a command in a pipeline does.
    """
    return await answers_of(client, calls, await send_all(client, [call.command() for call in calls]))


async def send_all(client: Control, commands: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Commands in one round trip (on a cluster, one per node): the reply of each, or what redis-py made of an error."""
    async with client.pipeline(transaction=False) as pipe:
        for command in commands:
            pipe.execute_command(*command)
        replies: list[Any] = await pipe.execute(raise_on_error=False)
    return replies


async def answers_of(client: Control, calls: Sequence[Call[T]], replies: Sequence[Any]) -> list[T | Exception]:
    """As `run_all`, of scripts that `send_all` has sent."""
    answers: list[T | Exception] = []
    for call, reply in zip(calls, replies, strict=True):
        try:
            if isinstance(reply, redis.exceptions.NoScriptError):
                answer = await run(client, call)
            else:
                with explained():
                    if isinstance(reply, Exception):
                        raise reply
                answer = _answer(call, reply)
            answers.append(answer)
        except REFUSED as e:
            answers.append(e)
    return answers


def _answer(call: Call[T], reply: Any) -> T:
    try:
        return call.read(reply)
    except (ValueError, TypeError, IndexError, AttributeError) as e:  # the script has handed on what stood in Redis
        raise foreign(str(e)) from e


@contextmanager
def explained() -> Iterator[None]:
    """What the server refuses, as `explain` has it: also what redis-py says of plain commands."""
    try:
        yield
    except redis.exceptions.ResponseError as e:
        error = explain(e)
        if error is e:
            raise
        raise error from e


async def ping(client: Control, settings: Settings) -> None:
    """Raises BrokerUnavailableError, in one line that names the server, if it does not answer within PING_TIMEOUT_S."""
    try:
        async with asyncio.timeout(PING_TIMEOUT_S):
            await client.ping()
    except redis.exceptions.NoPermissionError as e:
        raise explain(e) from e
    except (redis.exceptions.RedisError, BrokerUnavailableError, OSError) as e:
        raise cannot_reach(settings, e) from e


class Outage:
    """Says once that the server is away, and once that it is back; retries in between are silent."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._since: float | None = None

    def began(self, error: Exception) -> None:
        if self._since is None:
            self._since = time.monotonic()
            self._log.warning("%s; waiting for it", error)

    def ended(self) -> None:
        if self._since is not None:
            self._log.warning("the server is back after %.1f s", time.monotonic() - self._since)
            self._since = None


def backoff(*, first_s: float = 0.02, most_s: float = 1.0, seed: Any = None) -> Iterator[float]:
    """Waiting times between attempts to reconnect: doubling to `most_s`, each with full jitter of its upper half."""
    jitter, delay = random.Random(seed), first_s
    while True:
        yield delay * jitter.uniform(0.5, 1.0)
        delay = min(most_s, delay * 2)
