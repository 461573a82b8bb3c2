"""Where the time of a request goes in client and replica: each step alone, on batches as they are, without a server.

    python -m benchmarks.parts [--rounds 200]

Microseconds per request, the least of the rounds: what the step takes where nothing disturbs it.
"""

import argparse
import asyncio
import contextvars
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import hiredis

from millstream.broker import pickling, scripts
from millstream.broker.call import Call
from millstream.broker.codec import codec_for
from millstream.broker.keys import Keys
from millstream.broker.link import Messages
from millstream.broker.outcomes import open_stored
from millstream.config import PUBLIC_KEY
from millstream.handles.arguments import encode_rows
from millstream.handles.context import Request, current
from millstream.handles.item import Item
from millstream.replicas.attempt import read_entry

TOGETHER = 32  # requests, as the submitter sends them
KEYS = Keys("ms").deployment("default.NoOp")
CODEC = codec_for(PUBLIC_KEY, "ms", KEYS.tag)
METHOD, CLIENT = b"__call__", "0123456789abcdef"
Step = Callable[[], Any]


async def no_op(x: Any) -> Any:
    return x


def least_us(step: Step, rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - began)
    return best / TOGETHER * 1e6


def in_the_client() -> Iterator[tuple[str, Step]]:
    rows = [(x,) for x in range(TOGETHER)]
    bodies = [pickle.dumps((row, {}), 5) for row in rows]
    refs = [b"%022d" % x for x in range(TOGETHER)]
    seal = CODEC.sealer("request", METHOD)
    envelopes = [seal(ref, body) for ref, body in zip(refs, bodies, strict=True)]
    flat = [
        part
        for ref, body in zip(refs, envelopes, strict=True)
        for part in (ref, "normal", METHOD, b"", body)
    ]  # fmt: skip
    values = [CODEC.seal_value(ref, pickle.dumps(x, 5)) for x, ref in enumerate(refs)]
    stored = [b"succeeded normal 1700000000000-1\n" + value for value in values]
    told = [b"$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(a), a, len(b), b) for a, b in zip(refs, stored, strict=True)]
    message, messages = b"*%d\r\n%b" % (2 * TOGETHER, b"".join(told)), Messages()
    pending: dict[bytes, Item] = {}
    ended: deque[Item] = deque()

    def note() -> None:
        for number, ref in enumerate(refs):
            pending[ref] = Item(ended.append, CODEC, ref, 0.0, number)

    def settle() -> None:
        for ref, value in zip(refs, stored, strict=True):
            pending[ref].settle(value)
        ended.clear()
        note()

    note()
    yield "pickle the arguments", lambda: encode_rows(rows)
    yield "sign them", lambda: [seal(ref, body) for ref, body in zip(refs, bodies, strict=True)]
    yield "note who waits, and settle it", settle
    yield "write the submit", lambda: packed(scripts.submit(KEYS, CLIENT, flat))
    yield "take the message apart", lambda: messages.read(message)
    yield (
        "verify and unpickle the value",
        lambda: [open_stored(CODEC, ref, value) for ref, value in zip(refs, stored, strict=True)],
    )
    prefix: Any = KEYS.result_prefix.encode()
    yield "free the result", lambda: hiredis.pack_command(("UNLINK", *[prefix + ref for ref in refs]))


def in_the_replica() -> Iterator[tuple[str, Step]]:
    refs = [b"%022d" % x for x in range(TOGETHER)]
    open_, seal = CODEC.opener("request", METHOD), CODEC.seal_value
    bodies = [CODEC.seal("request", ref, pickle.dumps(((x,), {}), 5), METHOD) for x, ref in enumerate(refs)]
    fields = [
        [b"ref", ref, b"method", METHOD, b"reply", CLIENT.encode(), b"body", body]
        for ref, body in zip(refs, bodies, strict=True)
    ]
    entries = [b"1700000000000-%d" % x for x in range(TOGETHER)]
    answer = b"*1\r\n*2\r\n" + text(KEYS.lane("normal").encode()) + b"*%d\r\n" % TOGETHER
    for entry, flat in zip(entries, fields, strict=True):
        answer += b"*2\r\n" + text(entry) + b"*8\r\n" + b"".join(map(text, flat))
    reader = hiredis.Reader()
    values = [pickle.dumps(x, 5) for x in range(TOGETHER)]
    outcomes = [
        part
        for entry, ref, value in zip(entries, refs, values, strict=True)
        for part in (entry, ref, CLIENT.encode(), b"succeeded", seal(ref, value))
    ]

    def parse() -> None:
        reader.feed(answer)
        assert reader.gets()

    def run() -> None:
        for ref in refs:
            current.set(Request(KEYS.tag, ref))
            try:
                contextvars.copy_context().run(no_op(1).send, None)
            except StopIteration:
                continue

    yield "parse the entries", parse
    yield (
        "verify and unpickle the arguments",
        lambda: [open_(ref, body) for ref, body in zip(refs, bodies, strict=True)],
    )
    yield "run the coroutine in a context of its own", run
    yield "pickle the value", lambda: [pickling.dump_plain(x) for x in range(TOGETHER)]
    yield "sign it", lambda: [seal(ref, value) for ref, value in zip(refs, values, strict=True)]
    yield "write the finish", lambda: packed(scripts.finish(KEYS, "normal", 3600, outcomes))
    assert read_entry("normal", entries[0], fields[0]).ref == refs[0]


def packed(call: Call[Any]) -> bytes:
    data: bytes = hiredis.pack_command(call.command())
    return data


def text(part: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(part), part)


async def measure(rounds: int) -> None:
    for party, steps in (("client", in_the_client()), ("replica", in_the_replica())):
        total = 0.0
        print(f"{party}, µs per request:")
        for name, step in steps:
            took = least_us(step, rounds)
            total += took
            print(f"  {name:44} {took:5.2f}")
        print(f"  {'together':44} {total:5.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    asyncio.run(measure(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
