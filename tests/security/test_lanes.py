"""Somebody writes to the lanes of a deployment: each entry ends, nothing of it is executed, and genuine requests are served."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from millstream.broker import pickling
from millstream.broker.codec import codec_for
from millstream.broker.keys import GROUP, LANES, DeploymentKeys
from millstream.config import Settings
from millstream.errors import SignatureError
from millstream.handles.handle import SyncHandle
from millstream.handles.ref import ObjectRef
from tests.replica_helpers import Serving
from tests.scenarios.processes import wait_for
from tests.security.hostile import GARBAGE, OVERSIZED_BYTES, REF, Canary, Enemy, damaged, fuzzed

TAG = "app.Model"
KEYS = DeploymentKeys("ms", TAG)
SECRET = b"a secret for tests"


class Model:
    async def __call__(self, x: int) -> int:
        return x + 1

    async def slow(self, x: int) -> int:
        return x + 1

    def sync(self, x: int) -> int:
        return x + 1


def genuine(argument: int = 1, ref: bytes = REF, tag: str = TAG, method: bytes = b"__call__") -> bytes:
    return codec_for(SECRET, "ms", tag).seal("request", ref, pickling.dump(((argument,), {}), "a call"), method)


FIELDS = st.sampled_from(
    [
        "ref", "method", "reply", "body", "payload", "want", "deadline", "max_attempts", "kill", "stream", "attempt",
        "history", "lane", "retry", "retries", "dep:app.Model~" + "r" * 22, "dep:nonsense", "something else",
    ]
)  # fmt: skip
VALUES = st.one_of(
    GARBAGE, st.sampled_from([REF, b"__call__", b"slow", b"sync", b"1", b"99999999999999"]), st.just(genuine())
)
ENTRIES = st.one_of(
    st.dictionaries(FIELDS, VALUES, min_size=1, max_size=8),
    st.tuples(st.sampled_from([b"__call__", b"sync", b"\xff"]), st.one_of(damaged(genuine()), GARBAGE)).map(
        lambda pair: {"ref": REF, "method": pair[0], "reply": b"nobody", "body": pair[1]}
    ),
)


@pytest.fixture
def handle(serving: Serving) -> SyncHandle:
    """Two replicas behind it."""
    return serving.sync(Model, replicas=2)


def are_empty(client: Enemy) -> bool:
    """Nothing waits or is pending in any lane."""
    return all(client.xlen(KEYS.lane(lane)) == 0 for lane in LANES) and all(
        client.xpending(KEYS.lane(lane), GROUP)["pending"] == 0 for lane in LANES
    )


def test_whatever_is_written_to_a_lane_ends_and_replicas_serve_on(
    handle: SyncHandle, enemy: Enemy, canary: Canary
) -> None:
    numbers = iter(range(10_000))

    @fuzzed(120)
    @given(st.sampled_from(LANES), ENTRIES)
    @example("normal", {"ref": b"\xff" * 22, "method": b"__call__", "reply": b"", "body": b"junk"})
    @example("normal", {"ref": b"r" * 300, "method": b"\xff", "reply": b"\xff", "body": b"\x01jjunk"})
    @example("normal", {"ref": REF, "method": b"__call__", "reply": b"\xff", "body": genuine(), "want": b"matched"})
    @example("returned", {"ref": REF, "method": b"__call__", "reply": b"", "body": genuine(), "payload": b"9" * 15})
    @example(
        "low", {"ref": REF, "method": b"sync", "reply": b"", "body": genuine(method=b"sync"), "deadline": b"1" * 15}
    )
    def try_one(lane: str, entry: dict[str, bytes]) -> None:
        number = next(numbers)
        enemy.xadd(KEYS.lane(lane), entry)

        assert handle.call(number) == number + 1

    try_one()
    enemy.xadd(KEYS.lane("high"), {"ref": REF, "method": b"__call__", "reply": b"", "body": b"x" * OVERSIZED_BYTES})

    wait_for(lambda: are_empty(enemy), 20, "the end of all that was written")


def test_bomb_in_a_lane_does_not_go_off(handle: SyncHandle, enemy: Enemy, canary: Canary) -> None:
    for method in (b"__call__", b"sync"):
        for i, envelope in enumerate(canary.envelopes("ms", TAG, REF, method)):
            ref = b"%022d" % i
            enemy.hset(KEYS.open, ref, "normal 1-1")
            enemy.xadd(KEYS.lane("normal"), {"ref": REF, "method": method, "reply": b"", "body": envelope})
            enemy.hdel(KEYS.open, ref)

    assert handle.call(1) == 2
    wait_for(lambda: are_empty(enemy), 20)


def test_entry_with_more_fields_than_a_script_can_pass_on_is_a_dead_letter(handle: SyncHandle, enemy: Enemy) -> None:
    enemy.xadd(KEYS.lane("normal"), {f"field {i}": b"" for i in range(6000)})

    wait_for(lambda: enemy.xlen(KEYS.dead) == 1 and are_empty(enemy), 20)
    assert handle.call(1) == 2


@pytest.mark.parametrize(
    ("tag", "ref", "method"),
    [("app.Other", REF, b"__call__"), (TAG, b"s" * 22, b"__call__"), (TAG, REF, b"slow")],
    ids=["deployment", "ref", "method"],
)
def test_caller_of_a_request_whose_bytes_were_exchanged_gets_a_signature_error(
    serving: Serving, enemy: Enemy, tag: str, ref: bytes, method: bytes
) -> None:
    """The genuine bytes of another request are put in its place before a replica takes it."""
    handle = serving.deploy_only(Model)
    sync = SyncHandle(handle.deployment_name, handle.app_name)
    pending = sync.options(block_until="queued").remote(1)
    ((entry, fields),) = enemy.xrange(KEYS.lane("normal"))
    enemy.xdel(KEYS.lane("normal"), entry)
    again = enemy.xadd(KEYS.lane("normal"), {**fields, b"body": genuine(666, ref, tag, method)})
    enemy.hset(KEYS.open, fields[b"ref"], b"normal " + again)

    serving.start_replica(handle, Model)

    with pytest.raises(SignatureError, match="does not bear this installation's signature"):
        pending.result(timeout=20)


def test_dead_letter_of_what_nobody_can_read_is_told_to_its_caller(serving: Serving, enemy: Enemy) -> None:
    handle = serving.deploy_only(Model)
    pending = SyncHandle(handle.deployment_name, handle.app_name).options(block_until="queued").remote(1)
    ((entry, fields),) = enemy.xrange(KEYS.lane("normal"))
    enemy.xdel(KEYS.lane("normal"), entry)
    again = enemy.xadd(KEYS.lane("normal"), {**fields, b"deadline": b"soon"})
    enemy.hset(KEYS.open, fields[b"ref"], b"normal " + again)

    serving.start_replica(handle, Model)

    with pytest.raises(Exception, match="some other program wrote it"):
        pending.result(timeout=20)
    assert enemy.xlen(KEYS.dead) == 1


def test_same_bytes_twice_have_one_result(handle: SyncHandle, enemy: Enemy, settings: Settings) -> None:
    """Somebody repeats a request. It may run again, and its first result stands."""
    ref = handle.remote(1)
    assert ref.result(timeout=20) == 2
    local = ref.id.partition("~")[2]
    before = enemy.get(KEYS.result(local))

    enemy.xadd(
        KEYS.lane("normal"), {"ref": local, "method": b"__call__", "reply": b"", "body": genuine(1, local.encode())}
    )

    wait_for(lambda: are_empty(enemy), 20)
    assert enemy.get(KEYS.result(local)) == before
    assert ObjectRef.from_id(ref.id).result(timeout=20) == 2
