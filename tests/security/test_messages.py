"""Somebody publishes on the channels: callers get their results all the same, replicas go on, nothing is executed."""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.codec import codec_for
from millstream.broker.keys import DeploymentKeys
from millstream.errors import GetTimeoutError, MillstreamError, SignatureError
from millstream.handles.handle import SyncHandle
from millstream.replicas import orders
from tests.replica_helpers import PATIENCE_S, Gate, Serving
from tests.scenarios.processes import wait_for
from tests.security.hostile import GARBAGE, REF, Canary, Enemy, damaged, fuzzed

TAG = "app.Model"
KEYS = DeploymentKeys("ms", TAG)
CODEC = codec_for(b"a secret for tests", "ms", TAG)
gates: dict[str, Gate] = {}


class Model:
    async def __call__(self, x: int) -> int:
        return x + 1

    async def wait(self, x: int) -> int:
        await gates["now"].wait()
        return x + 1

    async def wait_and_count(self, n: int) -> object:
        await gates["now"].wait()
        for i in range(n):
            yield i

    async def stubborn(self, x: int) -> int:
        try:
            await gates["now"].wait()
        except asyncio.CancelledError:
            await gates["now"].wait()
        return x

    async def count(self, n: int) -> object:
        for i in range(n):
            yield i


@pytest.fixture
def handle(serving: Serving) -> Iterator[SyncHandle]:
    gates["now"] = Gate()
    yield serving.sync(Model, max_ongoing_requests=10)
    gates["now"].open()


def caller_of(client: Enemy) -> str:
    """The channel on which the one caller of this process hears."""
    (channel,) = client.pubsub_shardchannels(f"{KEYS.reply('')}*")
    return str(channel.decode())


def outcome_of(read: Callable[[], Any]) -> Any:
    """What a caller gets; `None` if it was waiting in vain."""
    try:
        return read()
    except GetTimeoutError:
        return None
    except MillstreamError:
        return "an error"


def message(*items: bytes) -> bytes:
    return b"*%d\r\n" % len(items) + b"".join(b"$%d\r\n%b\r\n" % (len(item), item) for item in items)


STORED = st.one_of(
    GARBAGE,
    st.sampled_from(
        [
            b"running x\n",
            b"item \n\n",
            b"item x\njunk\n",
            b"item 99999999999999999\n",
            b"succeeded normal 1-1\n",
            b"item 3\n",
        ]
    ),
    st.sampled_from([b"succeeded - -\n", b"failed normal 1-1\n", b"dead - -\n", b"item 0\n"]).flatmap(
        lambda header: GARBAGE.map(lambda body: header + body)
    ),
)
MESSAGES = st.one_of(
    GARBAGE,
    damaged(message(REF, b"succeeded normal 1-1\n" + CODEC.seal("value", REF, b"N."))),
    st.lists(st.one_of(st.just(REF), STORED), max_size=4).map(lambda items: message(*items)),
    st.sampled_from(
        [b"*1\r\n:1\r\n", b"*2\r\n*999999999\r\n", b"*-1\r\n", b"$5\r\nab", b"*2\r\n:1\r\n+a\r\n", b"_\r\n", b"*0\r\n"]
    ),
)


def test_nonsense_on_a_reply_channel_is_not_heard_and_costs_no_connection(handle: SyncHandle, enemy: Enemy) -> None:
    assert handle.call(1) == 2
    channel = caller_of(enemy)
    before = {row["id"] for row in enemy.client_list() if row["name"].startswith("ms:replies:")}

    @fuzzed(150)
    @given(MESSAGES)
    def try_one(text: bytes) -> None:
        enemy.execute_command("SPUBLISH", channel, text)

        assert handle.call(1) == 2

    try_one()

    assert {row["id"] for row in enemy.client_list() if row["name"].startswith("ms:replies:")} == before


def test_forged_result_on_a_reply_channel_is_a_millstream_error_and_nothing_is_executed(
    handle: SyncHandle, enemy: Enemy, canary: Canary
) -> None:
    handle.call(1)
    channel = caller_of(enemy)

    @fuzzed(60)
    @given(st.one_of(STORED, st.sampled_from(range(12))))
    def try_one(stored: bytes | int) -> None:
        gates["now"] = Gate()
        pending = handle.options(block_until="queued").wait.remote(1)
        ref = pending.id.partition("~")[2].encode()
        if isinstance(stored, int):
            stored = b"succeeded normal 1-1\n" + canary.envelopes("ms", TAG, ref)[stored]
        enemy.execute_command("SPUBLISH", channel, message(ref, stored))
        gates["now"].open()

        assert outcome_of(lambda: pending.result(timeout=PATIENCE_S)) in (2, "an error"), stored[:100]

    try_one()


def test_forged_value_is_a_signature_error(handle: SyncHandle, enemy: Enemy, canary: Canary) -> None:
    handle.call(1)
    pending = handle.options(block_until="queued").wait.remote(1)
    ref = pending.id.partition("~")[2].encode()
    (forged, *_) = canary.envelopes("ms", TAG, ref)

    enemy.execute_command("SPUBLISH", caller_of(enemy), message(ref, b"succeeded normal 1-1\n" + forged))

    with pytest.raises(SignatureError):
        pending.result(timeout=PATIENCE_S)


@pytest.mark.parametrize(
    "forged",
    [
        b"cancelled normal 1-1\nits caller cancelled it", b"timed_out - -\nits deadline passed", b"cancelled - -\n",
        b'dead normal 1-1\n[{"attempt": 3, "replica": "r-1", "cause": "killed", "at_ms": 1}]', b"", b"\xff\xfe", b"unknown",
        b"open",
    ],
)  # fmt: skip
def test_end_that_bears_no_signature_is_looked_up_and_not_believed(
    handle: SyncHandle, enemy: Enemy, forged: bytes
) -> None:
    handle.call(1)
    channel, pending, stream = caller_of(enemy), handle.wait.remote(1), handle.wait_and_count.stream(3)
    wait_for(lambda: enemy.hlen(KEYS.open) == 2)

    for ref in enemy.hkeys(KEYS.open):
        enemy.execute_command("SPUBLISH", channel, message(ref, forged))
    assert handle.call(1) == 2  # by then it has heard them, on the same connection
    gates["now"].open()

    assert pending.result(timeout=PATIENCE_S) == 2
    assert list(stream) == [0, 1, 2]


def test_nonsense_in_a_stream_ends_it_with_an_error_or_not_at_all(handle: SyncHandle, enemy: Enemy) -> None:
    handle.call(1)
    channel = caller_of(enemy)

    @fuzzed(40)
    @given(STORED)
    def try_one(stored: bytes) -> None:
        stream = handle.count.stream(5)
        for ref in enemy.hkeys(KEYS.open):
            enemy.execute_command("SPUBLISH", channel, message(ref, stored))
        assert outcome_of(lambda: list(stream)) in ([0, 1, 2, 3, 4], "an error"), stored[:100]

    try_one()


ORDERS = st.one_of(
    GARBAGE,
    st.lists(
        st.sampled_from(
            [b"cancel", b"kill", b"read", b"normal", b"1-1", b"\xff", b"-1", b"9" * 5000, b"7", "\u0667".encode()]
        ),
        max_size=5,
    ).map(b" ".join),
)


def test_nonsense_on_a_channel_of_orders_changes_nothing(handle: SyncHandle, enemy: Enemy) -> None:
    (channel,) = [channel.decode() for channel in enemy.pubsub_shardchannels(f"{KEYS.orders('')}*")]

    @fuzzed(150)
    @given(ORDERS)
    def try_one(text: bytes) -> None:
        enemy.execute_command("SPUBLISH", channel, text)

        assert handle.call(1) == 2

    try_one()

    (replica,) = enemy.hvals(KEYS.replicas)
    assert b"RUNNING" in replica


def channel_of_orders(client: Enemy) -> str:
    (channel,) = client.pubsub_shardchannels(f"{KEYS.orders('')}*")
    return str(channel.decode())


def looked_up(client: Enemy) -> int:
    """How often places of requests have been read, by anybody."""
    return int(client.info("commandstats").get("cmdstat_hmget", {}).get("calls", 0))


@pytest.mark.parametrize("order", [b"cancel ", b"kill "])
def test_forged_order_is_looked_up_and_not_obeyed(handle: SyncHandle, enemy: Enemy, order: bytes) -> None:
    pending = handle.wait.remote(1)
    (place,) = enemy.hvals(KEYS.open)
    before = looked_up(enemy)

    for _ in range(20):
        enemy.execute_command("SPUBLISH", channel_of_orders(enemy), order + place)
    assert handle.call(1) == 2  # by then it has heard them
    wait_for(lambda: looked_up(enemy) > before)
    gates["now"].open()

    assert pending.result(timeout=PATIENCE_S) == 2
    (replica,) = enemy.hvals(KEYS.replicas)
    assert b"RUNNING" in replica


def test_forged_order_to_kill_does_not_end_the_process_of_a_request_that_was_only_cancelled(
    serving: Serving, handle: SyncHandle, enemy: Enemy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orders, "CLEAN_UP_S", 0.05)
    channel, pending = channel_of_orders(enemy), handle.stubborn.remote(1)
    (place,) = enemy.hvals(KEYS.open)
    assert pending.cancel()
    before = looked_up(enemy)

    enemy.execute_command("SPUBLISH", channel, b"kill " + place)
    wait_for(lambda: looked_up(enemy) > before)
    time.sleep(0.1)

    assert handle.call(1) == 2
    assert not any("recycling" in message for message in serving._hosted[0].heard)


def test_order_that_cannot_be_looked_up_is_not_obeyed(handle: SyncHandle, enemy: Enemy) -> None:
    channel, pending = channel_of_orders(enemy), handle.options(timeout_s=PATIENCE_S).wait.remote(1)
    (place,) = enemy.hvals(KEYS.open)

    enemy.rename(KEYS.open, "aside")
    enemy.set(KEYS.open, b"\xff")
    before = looked_up(enemy)
    enemy.execute_command("SPUBLISH", channel, b"cancel " + place)
    wait_for(lambda: looked_up(enemy) > before)
    enemy.rename("aside", KEYS.open)
    gates["now"].open()

    assert pending.result(timeout=PATIENCE_S) == 2
