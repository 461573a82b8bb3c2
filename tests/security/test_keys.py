"""Somebody writes over a key: no part dies, hangs or executes anything; and once it is mended, all goes on.

`tests/docs/test_keyspace.py` knows all keys there are; the last test here sees to it that each of them is tried.
"""

import inspect
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.codec import codec_for
from millstream.broker.keys import LANES, DeploymentKeys, Keys
from millstream.broker.outcomes import open_stored
from millstream.config import Settings
from millstream.errors import GetTimeoutError, MillstreamError, RefNotFoundError, SignatureError
from millstream.handles.handle import SyncHandle
from millstream.handles.ref import ObjectRef
from tests.replica_helpers import PATIENCE_S, Serving
from tests.scenarios.processes import wait_for
from tests.security.hostile import GARBAGE, Canary, Enemy, damaged, fuzzed

TAG = "app.Model"
ALL, KEYS = Keys("ms"), DeploymentKeys("ms", TAG)
LARGE = b"x" * 200_000
# Of the whole deployment, shared by its requests. Each is replaced by a text, and by something of its own type.
SHARED: dict[str, Any] = {
    **{KEYS.lane(lane): "stream" for lane in LANES},
    KEYS.open: "hash",
    KEYS.held: "hash",
    KEYS.parked: "zset",
    KEYS.due: "zset",
    KEYS.deadlines: "zset",
    KEYS.notes: "hash",
    KEYS.holds: "hash",
    KEYS.dead: "stream",
    KEYS.config: "hash",
    KEYS.definition: "string",
    KEYS.status: "hash",
    KEYS.scaling: "stream",
    KEYS.replicas: "hash",
    KEYS.lease("r-1"): "string",
}


class Model:
    async def __call__(self, x: int) -> int:
        return x + 1

    async def large(self) -> bytes:
        return LARGE

    async def length(self, value: bytes) -> int:
        return len(value)

    async def count(self, n: int) -> object:
        for i in range(n):
            yield i


@pytest.fixture
def handle(serving: Serving) -> SyncHandle:
    return serving.sync(Model)


def garbage_of(client: Enemy, kind: str, key: str) -> None:
    """Put fields into a key that no script of ours writes."""
    match kind:
        case "stream":
            client.xadd(key, {b"\xff": b"\xff", b"history": b"[" * 5000})
        case "hash":
            fields = [b"r" * 22, b"\xff" * 22, b"config", b"target", b"override", b"version", b"r-1", b"max_attempts"]
            client.hset(key, mapping={field: b"\xff{" for field in fields})
        case "zset":
            client.zadd(key, {b"\xff" * 22: 1.0, b"r" * 22: float("-inf"), b"s" * 22: float("inf")})
        case _:
            client.set(key, b"\xff\0garbage")


def answer(handle: SyncHandle) -> str:
    """What becomes of a request that must not hang."""
    try:
        assert handle.options(timeout_s=1.5).call(1) == 2
        return "a value"
    except MillstreamError as e:
        return type(e).__name__


@pytest.mark.parametrize("how", ["another type", "its own type"])
@pytest.mark.parametrize("key", SHARED, ids=lambda key: key.rpartition("}:")[2])
def test_deployment_serves_on_once_a_key_is_mended(handle: SyncHandle, enemy: Enemy, key: str, how: str) -> None:
    assert handle.call(1) == 2
    before = enemy.dump(key)

    enemy.delete(key)
    if how == "its own type":
        if before is not None:
            enemy.restore(key, 0, before)
        garbage_of(enemy, SHARED[key], key)
    else:
        enemy.set(key, b"\xff\0garbage")
    answer(handle)
    enemy.delete(key)
    if before is not None:
        enemy.restore(key, 0, before)

    wait_for(lambda: answer(handle) == "a value", PATIENCE_S, "service after the mend")


# what belongs to one request


def ended(handle: SyncHandle) -> tuple[ObjectRef, str]:
    ref = handle.remote(1)
    assert ref.result(timeout=PATIENCE_S) == 2
    return ref, ref.id.partition("~")[2]


def test_result_that_was_tampered_with_is_an_error_for_whoever_reads_it(
    handle: SyncHandle, enemy: Enemy, settings: Settings, canary: Canary
) -> None:
    ref, local = ended(handle)
    genuine = enemy.get(KEYS.result(local))
    codec = codec_for(settings.secret_key, "ms", TAG)
    assert isinstance(genuine, bytes)

    @fuzzed(80)
    @given(
        st.one_of(
            damaged(genuine),
            GARBAGE,
            GARBAGE.map(lambda body: b"succeeded - -\n" + body),
            st.sampled_from(range(12)),
            GARBAGE.map(lambda body: b"dead - -\n" + body),
        )
    )
    def try_one(stored: bytes | int) -> None:
        if isinstance(stored, int):
            stored = b"succeeded normal 1-1\n" + canary.envelopes("ms", TAG, local.encode())[stored]
        enemy.set(KEYS.result(local), stored, ex=60)
        try:
            value = ObjectRef.from_id(ref.id).result(timeout=PATIENCE_S)
        except GetTimeoutError:
            pytest.fail(f"it hangs on {stored[:100]!r}")
        except MillstreamError:
            return
        assert value == 2 and stored.partition(b"\n")[2] == genuine.partition(b"\n")[2]

    try_one()
    with pytest.raises(SignatureError):
        open_stored(codec, local.encode(), b"succeeded normal 1-1\n" + genuine)


def test_result_of_another_type_is_an_error(handle: SyncHandle, enemy: Enemy) -> None:
    ref, local = ended(handle)
    enemy.delete(KEYS.result(local))
    enemy.lpush(KEYS.result(local), b"x")
    enemy.expire(KEYS.result(local), 60)

    with pytest.raises(MillstreamError):
        ObjectRef.from_id(ref.id).result(timeout=PATIENCE_S)


@pytest.mark.parametrize("how", ["flipped", "short", "bomb", "another type", "huge"])
def test_large_value_that_was_tampered_with_is_an_error(
    handle: SyncHandle, enemy: Enemy, canary: Canary, how: str
) -> None:
    ref = handle.large.remote()
    ref_id = ref.id
    wait_for(lambda: ref.done())
    local = ref_id.partition("~")[2]
    (key,) = enemy.scan_iter(f"{KEYS.value_prefix}{local}:*")
    piece = enemy.lindex(key, 0)
    assert isinstance(piece, bytes)
    match how:
        case "flipped":
            enemy.lset(key, 0, piece[:-1] + bytes([piece[-1] ^ 1]))
        case "short":
            enemy.lset(key, 0, piece[:-1])
        case "bomb":
            enemy.lset(key, 0, canary.envelopes("ms", TAG, local.encode())[0].ljust(len(piece), b"\0"))
        case "another type":
            enemy.set(key, b"garbage", ex=60)
        case "huge":
            stored = enemy.get(KEYS.result(local))
            enemy.set(KEYS.result(local), stored.partition(b"\n")[0] + b"\n@999999999999999\n", ex=60)

    with pytest.raises((SignatureError, RefNotFoundError)):
        ObjectRef.from_id(ref_id).result(timeout=PATIENCE_S)


@pytest.mark.parametrize("how", ["flipped", "bomb", "another type"])
def test_large_arguments_that_were_tampered_with_fail_the_request(
    serving: Serving, enemy: Enemy, canary: Canary, how: str
) -> None:
    handle = serving.deploy_only(Model)
    sync = SyncHandle(handle.deployment_name, handle.app_name)
    ref = sync.options(block_until="queued").length.remote(LARGE)
    local = ref.id.partition("~")[2]
    piece = enemy.lindex(KEYS.payload(local), 0)
    assert isinstance(piece, bytes)
    if how == "another type":
        enemy.set(KEYS.payload(local), b"garbage")
    elif how == "bomb":
        bomb = canary.envelopes("ms", TAG, local.encode(), b"length")[1]
        enemy.lset(KEYS.payload(local), 0, bomb.ljust(len(piece), b"\0"))
    else:
        enemy.lset(KEYS.payload(local), 0, bytes([piece[0] ^ 1]) + piece[1:])

    serving.start_replica(handle, Model)

    with pytest.raises(MillstreamError):
        ref.result(timeout=PATIENCE_S)
    assert sync.call(1) == 2


def test_items_that_were_written_over_do_not_hang_the_reader(handle: SyncHandle, enemy: Enemy, canary: Canary) -> None:
    stream = handle.options(stream=True).count.remote(40)
    wait_for(lambda: any(enemy.scan_iter(f"{KEYS.items('')}*")))
    (key,) = enemy.scan_iter(f"{KEYS.items('')}*")
    enemy.delete(key)
    enemy.set(key, b"garbage", ex=60)

    with suppress(MillstreamError):
        assert list(stream) == list(range(40))  # all of them had come as messages
    assert handle.call(1) == 2


def test_supplied_value_that_was_tampered_with_fails_the_dependant(
    serving: Serving, enemy: Enemy, canary: Canary
) -> None:
    handle = serving.sync(Model)
    delayed = handle.options(delay_s=0.5, block_until="queued")
    first, second = handle.remote(1), handle.remote(2)
    assert (first.result(timeout=PATIENCE_S), second.result(timeout=PATIENCE_S)) == (2, 3)
    ref = delayed.remote(first)
    local = ref.id.partition("~")[2]
    wait_for(lambda: enemy.exists(KEYS.supplied(local)))
    bomb = canary.envelopes("ms", TAG, first.id.partition("~")[2].encode())[0]
    enemy.hset(KEYS.supplied(local), f"dep:{first.id}", b"succeeded normal 1-1\n" + bomb)

    with pytest.raises(SignatureError):
        ref.result(timeout=PATIENCE_S)


# of the page


PER_REQUEST = {"supplied", "payload", "arriving", "value", "items", "result"}
ELSEWHERE = {
    "apps",
    "nodes",
    "node_lease",
    "node_plan",
    "leader",
    "fence",
    "changes",
    "secret_check",
}  # test_control_plane
CHANNELS = {"reply", "orders", "node_wake"}  # test_messages, test_control_plane


def test_every_key_there_is_is_tried() -> None:
    def names(cls: type) -> set[str]:
        return {name for name, member in vars(cls).items() if name[0] != "_" and _is_key(member)}

    tried = {"lane", "open", "held", "parked", "due", "deadlines", "notes", "holds", "dead", "config", "definition",
             "status", "scaling", "replicas", "lease"}  # fmt: skip

    assert names(DeploymentKeys) | names(Keys) == tried | PER_REQUEST | ELSEWHERE | CHANNELS


def _is_key(member: Any) -> bool:
    doc = inspect.getdoc(getattr(member, "func", member)) or ""
    return doc.startswith(("string", "hash", "stream", "list", "sorted set", "sharded channel", "channel"))
