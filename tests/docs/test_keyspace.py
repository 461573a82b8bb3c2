"""docs/keyspace.md against the code that spells the keys, against a live system, and against its own test vectors."""

import hashlib
import inspect
import json
import pickle
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import redis

import millstream
from millstream import serve
from millstream.broker import control_scripts, scripts
from millstream.broker.call import Call
from millstream.broker.codec import Codec
from millstream.broker.connection import Control, run
from millstream.broker.keys import LANES, DeploymentKeys, Keys, split_ref
from millstream.broker.pickling import Pickled
from millstream.broker.scripts import Ended, Submitted
from millstream.broker.states import TERMINAL
from millstream.errors import ReplicaDiedError
from millstream.handles.handle import SyncHandle
from tests.docs import application, pages
from tests.helpers import CALLER, REPLICA, asking, claim, deploy_config
from tests.servers import Server

LUA = pages.ROOT / "broker" / "lua"
TYPES = {"hash": "hash", "stream": "stream", "string": "string", "sorted set": "zset", "list": "list"}
PLACEHOLDERS = {
    "<tag>": r"[\w-]+\.[\w-]+",
    "<ref>": r"[\w-]{22}",
    "<lane>": "|".join(LANES),
    "<node>": r"[\w-]+",
    "<replica>": "r-[0-9a-f]{6}",
    "<client>": "[0-9a-f]{16}",
    "<name>": "[0-9a-f]{16}",
    "<part>": r"[\d.-]+",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One key or channel as the page describes it."""

    name: str
    type: str
    has_ttl: bool
    ends: str

    def matches(self, key: str) -> bool:
        parts = re.split("(<[a-z]+>)", self.name)
        return bool(
            re.fullmatch("".join(f"(?:{PLACEHOLDERS.get(p)})" if p[:1] == "<" else re.escape(p) for p in parts), key)
        )


def described_keys() -> list[Row]:
    rows = pages.table(pages.KEYSPACE, "Keys of the installation") + pages.table(pages.KEYSPACE, "Keys of a deployment")
    return [Row(pages.unquoted(r["Key"]), r["Type"], {"yes": True, "no": False}[r["TTL"]], r["Ends"]) for r in rows]


def described_channels() -> list[Row]:
    rows = pages.table(pages.KEYSPACE, "Channels")
    return [Row(pages.unquoted(row["Channel"]), row["Kind"], False, "") for row in rows]


# against broker/keys.py


def spelled() -> dict[str, str]:
    """Every key and channel of keys.py with placeholders for its arguments -> the first words of its docstring."""
    found = {}
    for keys in (Keys("ms"), DeploymentKeys("ms", "<tag>")):
        for name, member in vars(type(keys)).items():
            if (
                isinstance(member, cached_property)
                and member.func.__doc__
                and name not in ("owned", "of_submit", "of_finish")
            ):
                found[getattr(keys, name)] = first_words(member.func)
            elif inspect.isfunction(member) and not name.startswith("_") and name != "deployment":
                _, *arguments = inspect.signature(member).parameters
                placeholders = ["<lane>"] if name == "lane" else [f"<{argument}>" for argument in arguments]
                found[getattr(keys, name)(*placeholders)] = first_words(member)
    return found


def first_words(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition(":")[0]


def test_every_key_of_the_code_is_on_the_page_and_the_other_way_round() -> None:
    described = {row.name for row in described_keys() + described_channels()}

    assert described == set(spelled())


def test_page_and_code_agree_on_types() -> None:
    for row in described_keys():
        words = spelled()[row.name]
        assert words.startswith(row.type), f"{row.name} is a {row.type!r} on the page, a {words!r} in keys.py"
        assert ("with TTL" in words) == row.has_ttl, row.name
    for row in described_channels():
        assert spelled()[row.name] == {"sharded": "sharded channel", "plain": "channel"}[row.type]


# against a live system


@contextmanager
def activity(settings_url: str, gate: Path) -> Iterator[None]:
    """An application at work: queued, running, parked, delayed, ended and dead requests at once."""
    millstream.init(settings_url, secret_key="a secret for tests")
    try:
        serve.run(application.app)
        running = handle_of("Gate").remote(str(gate))
        waiting = [handle_of("Gate").options(block_until="queued").remote(str(gate)), handle_of("Echo").remote(running)]
        handle_of("Echo").options(delay_s=3600).remote("later")
        with pytest.raises(ReplicaDiedError):
            handle_of("Crash").call()
        assert handle_of("Echo").call("now") == "now"
        millstream.put("kept")
        with redis.Redis.from_url(settings_url) as client:
            seed_what_no_handle_makes(client, split_ref(waiting[0].id)[1])
        yield
        gate.touch()
        assert [ref.result(timeout=10) for ref in waiting] == ["open", "open"]
    finally:
        gate.touch()
        serve.shutdown()


def seed_what_no_handle_makes(client: "redis.Redis", queued: str) -> None:
    """The rest of what can lie in Redis, by the scripts, under the access rule that the page gives."""

    def carry_out(call: Call[Any]) -> Any:
        return call.read(client.eval(call.script.source.decode(), len(call.keys), *call.keys, *call.arguments))

    gate, echo = DeploymentKeys("ms", "default.Gate"), DeploymentKeys("ms", "default.Echo")
    kept, cancelled, upstream = "k" * 22, "c" * 22, "u" * 22
    value, upstream_id = echo.value(upstream, "1-1"), f"default.Echo~{upstream}"
    extras = asking(want="matched", timeout_ms=3_600_000, attempts=2, kill=True, stream=4, payload=True).encode()
    arriving = echo.arriving("0123456789abcdef")
    for key in (arriving, value, echo.payload(kept), echo.payload(cancelled)):
        client.rpush(key, b"a piece", b"another")
        client.pexpire(key, 600_000)
    for ref in (kept, cancelled):
        hold = scripts.hold(
            echo, "", ref.encode(), "low", b"m", b"", extras=extras, delay_ms=3_600_000, depends_on=[upstream_id]
        )
        supply = scripts.supply(echo, ref, upstream_id, b"succeeded normal 1-1\n@13", [value])
        assert [carry_out(call) for call in (hold, scripts.keep([value]), supply)] == ["new", 1, "delayed"]
    assert carry_out(scripts.cancel(echo, 60, "for the page", [cancelled]))[0] == [(Ended.ENDED, 0)]
    ((early, _),), _ = carry_out(scripts.cancel(echo, 60, "for the page", [kept], overdue=True))
    assert (early, carry_out(scripts.wake(echo))) == (Ended.EARLY, 0)
    place: Any = client.hget(gate.open, queued)
    emitted = carry_out(scripts.emit(gate, queued, place.decode(), b"", 60, 0, [b"an item", b"another"]))
    removed = carry_out(scripts.consume(gate, queued, 1))
    asked = carry_out(scripts.emit(gate, queued, place.decode(), b"", 60, 0, []))
    assert (emitted, removed, asked) == ((True, 0), 1, (True, 1))


def handle_of(deployment: str) -> SyncHandle:
    return serve.get_deployment_handle(deployment, sync=True)


def find_keys(server: Server) -> dict[str, tuple[str, bool]]:
    """Key -> type, has TTL."""
    with server.connect_blocking() as client:
        names = list(client.scan_iter(count=1000))
        found: Any = {name.decode(): (client.type(name), client.pttl(name)) for name in names}
    return {name: (kind.decode(), ttl_ms != -1) for name, (kind, ttl_ms) in found.items() if kind != b"none"}


@pytest.mark.processes
def test_page_describes_what_is_there(start_server: Callable[..., Server], tmp_path: Path) -> None:
    server, rows = start_server(), described_keys()
    rule = [word for word in access_rule("a-password") if (server.name, word) != ("redis7", "+client|setinfo")]

    with server.connect_blocking() as client:
        client.execute_command("ACL", *rule)
        with activity(f"redis://millstream:a-password@127.0.0.1:{server.port}", tmp_path / "gate"):
            seen = look_until_complete(server, rows)
            sharded, plain = client.pubsub_shardchannels(), client.pubsub_channels()
        left = find_keys(server)
        refused = client.execute_command("ACL", "LOG")

    assert mistaken(rows, seen) == []
    assert [row.name for row in rows if not any(row.matches(key) for key in seen)] == [], "described, and not there"
    for kind, heard in (("sharded", sharded), ("plain", plain)):
        described = [row for row in described_channels() if row.type == kind]
        assert heard and [name for name in heard if not any(row.matches(name.decode()) for row in described)] == []
    permanent = [row for row in rows if row.has_ttl or row.ends == "never"]
    assert [key for key in left if not any(row.matches(key) for row in permanent)] == [], "should have ended"
    assert refused == [], "the rule on the page is not enough"


def look_until_complete(server: Server, rows: list[Row]) -> dict[str, tuple[str, bool]]:
    """What is there; looks again for a while where something is missing: replicas register when they are up."""
    deadline = time.monotonic() + 10
    while True:
        seen = find_keys(server)
        if all(any(row.matches(key) for key in seen) for row in rows) or time.monotonic() > deadline:
            return seen
        time.sleep(0.05)


def mistaken(rows: list[Row], seen: dict[str, tuple[str, bool]]) -> list[str]:
    """What is there and is not as described."""
    wrong = []
    for key, (kind, has_ttl) in seen.items():
        found = [row for row in rows if row.matches(key)]
        if len(found) != 1:
            wrong.append(f"{key} is described {len(found)} times")
        elif (TYPES[found[0].type], found[0].has_ttl) != (kind, has_ttl):
            wrong.append(f"{key} is a {kind} {'with' if has_ttl else 'without'} TTL, described otherwise")
    return wrong


# what is inside


@pytest.mark.anyio
@pytest.mark.fake
async def test_fields_of_an_entry_are_those_on_the_page(redis: Control, keys: DeploymentKeys) -> None:
    await deploy_config(redis, keys)
    await redis.set(keys.payload("r" * 22), b"arguments", px=60_000)
    extras = asking(want="matched", timeout_ms=60_000, attempts=2, kill=True, stream=4, payload=True, retry="{}")
    call = scripts.hold(
        keys, CALLER, b"r" * 22, "low", b"m", b"", extras=extras.encode(), depends_on=["up.Up~" + "u" * 22]
    )
    await run(redis, call)
    await run(redis, scripts.supply(keys, "r" * 22, "up.Up~" + "u" * 22, b"value"))
    (one,) = await claim(redis, keys)
    await run(redis, scripts.retry(keys, "low", [one.entry, one.ref, 0, "{}"]))
    await run(redis, control_scripts.sweep(keys))
    await claim(redis, keys)
    await run(redis, scripts.release(keys, "low", REPLICA, "killed", expired=False))

    (one,) = await claim(redis, keys)

    described = {pages.unquoted(row["field"]) for row in pages.table(pages.KEYSPACE, "Inside the keys")}
    assert {re.sub("^dep:.*", "dep:<ref id>", name.decode()) for name in one.fields} == described


def test_first_lines_of_results_are_those_of_the_terminal_states() -> None:
    rows = pages.table(pages.KEYSPACE, "Inside the keys", number=2)
    described = {word for row in rows for word in re.findall(r"`(\w+) (?:<lane>|-)", row["first line"])}

    assert described == {str(state) for state in TERMINAL}


# submit


def test_keys_of_submit_are_those_on_the_page() -> None:
    rows = pages.table(pages.KEYSPACE, "Sending a request from another language")
    described = [pages.unquoted(next(reversed(row.values()))).removesuffix(" (a prefix)") for row in rows]

    assert described[: len(described) - 3] == list(scripts.submit(DeploymentKeys("ms", "<tag>"), "", []).keys)


def test_extras_are_those_on_the_page() -> None:
    rows = pages.table(pages.KEYSPACE, "Sending a request from another language", number=2)
    source = (LUA / "extras.lua").read_text()

    assert {pages.unquoted(row["field"]) for row in rows} == set(re.findall(r"extras\.(\w+)", source))


def test_words_that_submit_answers_are_those_on_the_page() -> None:
    rows = pages.table(pages.KEYSPACE, "Sending a request from another language", number=3)

    assert [pages.unquoted(row["word"]) for row in rows] == [str(word) for word in Submitted if word != Submitted.NEW]


# the access rule


def access_rule(password: str = "<password>", user: str = "millstream") -> list[str]:
    """The words after ACL of what makes this user."""
    (rule,) = [block.text for block in pages.blocks(pages.KEYSPACE, "text") if f"SETUSER {user} " in block.text]
    return rule.replace("<password>", password).split()[1:]


@pytest.mark.parametrize("path", sorted(LUA.glob("*.lua")), ids=lambda path: path.stem)
def test_rule_allows_what_the_scripts_call(path: Path) -> None:
    called = re.findall(r"redis\.p?call\(\s*'(\w+)'(?:\s*,\s*'([A-Z]+)')?", path.read_text())
    grouped = {"XGROUP", "XINFO", "CLIENT"}
    commands = {f"+{name}|{sub}".lower() if name in grouped else f"+{name}".lower() for name, sub in called}

    assert commands - set(access_rule()) == set()


# the wire format


def signature(kind: str, method: str, ref: str, form: str, body: bytes) -> bytes:
    """As the page says it, in other words than `broker/codec.py`."""
    named = b"".join(bytes([len(name)]) + name.encode() for name in (method, ref))
    if form == "b":
        body = hashlib.sha256(body).digest()
    signed = b"\0".join([b"ms", b"default.Review", form.encode() + named + body])
    return hashlib.blake2b(signed, key=b"a secret", digest_size=16, person=b"ms " + kind.encode()).digest()


def vectors() -> list[dict[str, str]]:
    return [
        {name: pages.unquoted(cell) for name, cell in row.items()}
        for row in pages.table(pages.KEYSPACE, "Test vectors")
    ]


@pytest.mark.parametrize("vector", vectors(), ids=lambda v: f"{v['kind']}-{v['form']}-{v['body'][:8]}")
def test_vector_is_what_the_code_and_the_description_make_of_it(vector: dict[str, str]) -> None:
    kind, method, form, ref = vector["kind"], vector["method"], vector["form"], "0123456789abcdefghijkl"
    is_json = form == "j"
    body = vector["body"].encode() if is_json else bytes.fromhex(vector["body"].removesuffix(" (hex)"))
    data, buffers = apart(body) if form == "b" else (body, [])
    value = json.loads(body) if is_json else pickle.loads(data, buffers=[bytearray(buffer) for buffer in buffers])
    codec: Any = Codec(b"a secret", "ms", "default.Review")

    envelope = b"\x01" + form.encode() + signature(kind, method, ref, form, body) + body

    assert envelope.hex() == vector["envelope (hex)"]
    assert codec.open(kind, ref.encode(), envelope, method.encode()) == value
    match form:
        case "j":
            sealed = codec.seal_json(kind, ref.encode(), value, method.encode())
        case "p":
            sealed = codec.seal(kind, ref.encode(), body, method.encode())
        case _:
            pickled = Pickled(data, [memoryview(buffer) for buffer in buffers])
            sealing = codec.sealing(kind, ref.encode(), pickled, method.encode())
            sealed = b"".join([sealing.sign(), *sealing.parts])
    assert sealed == envelope


def apart(body: bytes) -> tuple[bytes, list[bytes]]:
    """The pickle and the buffers of a body of form b, in other words than `broker/codec.py`."""
    count = int.from_bytes(body[:4], "little")
    sizes = [int.from_bytes(body[4 + 8 * number : 12 + 8 * number], "little") for number in range(count)]
    buffers = list[bytes]()
    for size in reversed(sizes):
        body, buffer = body[: len(body) - size], body[len(body) - size :]
        buffers.insert(0, buffer)
    return body[4 + 8 * count :], buffers
