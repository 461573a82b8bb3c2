"""The broker's path alone, two processes: submit, claim, finish, notify, with signed bodies and no-op work.

    python benchmarks/bare_path.py [--requests 20000] [--rounds 5] [--replies pubsub|list|both]

It decides the reply path: `pubsub` is what the product does (one sharded message per client and flush); `list` pushes
the same bytes on a list in the deployment's slot, which the client reads with BLMPOP. Both run interleaved.
"""

import argparse
import asyncio
import itertools
import os
import pickle
import resource
import statistics
import subprocess
import sys
import time
from collections import deque
from typing import Any

import hiredis

from millstream.broker import scripts
from millstream.broker.call import script
from millstream.broker.codec import codec_for
from millstream.broker.keys import Keys
from millstream.broker.link import Link, dial
from millstream.config import PUBLIC_KEY, Settings

SECRET = PUBLIC_KEY
KEYS = Keys("bench").deployment("bare.noop")
CODEC = codec_for(SECRET, "bench", KEYS.tag)
CLAIM_AT_ONCE = 500
DIRECT = ("XREADGROUP", "GROUP", "replicas", "r1", "COUNT", CLAIM_AT_ONCE, "STREAMS", KEYS.lane("normal"), ">")


def use_list_replies() -> None:
    """Make the finish script push its message on a list instead of publishing it."""
    finish = script("finish")
    finish.source = finish.source.replace(
        b"redis.call('SPUBLISH', replies .. client, ",
        b"redis.call('EXPIRE', replies .. client, 60) redis.call('RPUSH', replies .. client, ",
    )
    finish.sha = __import__("hashlib").sha1(finish.source).hexdigest().encode()


def cpu_us() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return (usage.ru_utime + usage.ru_stime) * 1e6


async def method(x: int) -> int:
    return x


async def replica(settings: Settings) -> None:
    reads, writes = await dial(settings, "replica-reads"), await dial(settings, "replica-writes")
    loop, finished, served, started_at = asyncio.get_running_loop(), deque[Any](), 0, 0.0
    flushing = False

    def flush() -> None:
        nonlocal flushing
        flushing = False
        while finished:
            batch = [finished.popleft() for _ in range(min(len(finished), 5 * 300))]
            writes.start(scripts.finish(KEYS, "normal", 600, batch), lambda _: None)

    def run(entry: bytes, fields: list[bytes]) -> None:
        nonlocal flushing
        ref, name, client, envelope = fields[1], fields[3], fields[5], fields[7]
        args, kwargs = CODEC.open("request", ref, envelope, name)
        try:
            method(*args, **kwargs).send(None)
        except StopIteration as done:
            envelope = CODEC.seal("value", ref, pickle.dumps(done.value, 5))
            finished.extend((entry, ref, client, b"succeeded", envelope))
        if not flushing:
            flushing = True
            loop.call_soon(flush)

    while True:
        direct = 0
        reply = await reads.ask(
            "XREADGROUP", "GROUP", "replicas", "r1", "COUNT", 1, "BLOCK", 2000, "STREAMS", *KEYS.lanes, *">>>>"
        )
        while reply:
            for _, entries in reply:
                for entry, fields in entries:
                    started_at = started_at or cpu_us()
                    if fields[3] == b"stop":
                        print(f"{(cpu_us() - started_at) / max(served, 1):.1f}")
                        return
                    served += 1
                    run(entry, fields)
            if direct:
                direct -= 1
                reply = await reads.ask(*DIRECT)
            else:
                direct, reply = await reads.run(scripts.claim(KEYS, "r1", CLAIM_AT_ONCE, 3))


class Client:
    def __init__(self, settings: Settings, how: str) -> None:
        self.settings, self.how = settings, how
        self.name = os.urandom(8).hex()
        self.waiting: dict[bytes, asyncio.Future[Any]] = {}
        self.buffer: list[Any] = []
        self.in_the_air = 0
        self.numbers, self.prefix = itertools.count(), os.urandom(6).hex()

    async def start(self) -> None:
        self.reader = hiredis.Reader()
        self.commands = await dial(self.settings, "client-commands")
        self.replies = await dial(self.settings, "client-replies", self.on_message)
        if self.how == "pubsub":
            self.replies.send(lambda _: None, "SSUBSCRIBE", KEYS.reply(self.name))
        else:
            self.read_list(None)

    def read_list(self, reply: Any) -> None:
        if isinstance(reply, Exception):
            return
        for message in reply[1] if reply else ():
            self.on_message(message)
        self.replies.send(self.read_list, "BLMPOP", 5, 1, KEYS.reply(self.name), "LEFT", "COUNT", 100)

    def on_message(self, message: bytes) -> None:
        self.reader.feed(message)
        items = self.reader.gets()
        for i in range(0, len(items), 2):
            future = self.waiting.pop(items[i], None)
            if future is not None:
                stored = items[i + 1]
                future.set_result(CODEC.open("value", items[i], stored[stored.index(b"\n") + 1 :]))

    def call(self, x: int) -> asyncio.Future[Any]:
        ref = b"%b%010x" % (self.prefix.encode(), next(self.numbers))
        envelope = CODEC.seal("request", ref, pickle.dumps(((x,), {}), 5), b"__call__")
        future = self.waiting[ref] = asyncio.get_running_loop().create_future()
        self.buffer += (ref, "normal", b"__call__", b"", envelope)
        if not self.in_the_air or len(self.buffer) >= 5 * 64:
            self.flush()
        return future

    def flush(self) -> None:
        if self.buffer:
            self.in_the_air += 1
            self.commands.start(scripts.submit(KEYS, self.name, self.buffer), self.flushed)
            self.buffer = []

    def flushed(self, reply: Any) -> None:
        assert reply == {}, reply
        self.in_the_air -= 1
        self.flush()


async def measure(settings: Settings, how: str, count: int) -> dict[str, float]:
    admin = await dial(settings, "admin")
    await admin.ask("FLUSHALL")
    await admin.ask("HSET", KEYS.config, "max_attempts", 3)
    for lane in KEYS.lanes:
        await admin.ask("XGROUP", "CREATE", lane, "replicas", 0, "MKSTREAM")
    command = [sys.executable, __file__, "--replica", settings.url, "--replies", how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220 - nothing else runs here
    client = Client(settings, how)
    await client.start()
    for x in range(200):
        await client.call(x)
    server_cpu, cpu, t = await server_cpu_us(admin), cpu_us(), time.perf_counter()
    assert [await future for future in [client.call(x) for x in range(count)]] == list(range(count))
    figures = {
        "requests/s": count / (time.perf_counter() - t),
        "client us": (cpu_us() - cpu) / count,
        "server us": (await server_cpu_us(admin) - server_cpu) / count,
    }
    times = []
    for x in range(1500):
        t = time.perf_counter()
        await client.call(x)
        times.append((time.perf_counter() - t) * 1e3)
    figures["serial p50 ms"] = statistics.median(times)
    figures["serial p99 ms"] = statistics.quantiles(times, n=100)[98]
    await admin.ask(*scripts.submit(KEYS, "x", [b"s" * 22, "normal", "stop", "", ""]).full_command())
    figures["replica us"] = float((await asyncio.to_thread(process.communicate))[0])
    client.commands.close()
    client.replies.close()
    admin.close()
    return figures


async def server_cpu_us(admin: Link) -> float:
    fields = dict(
        line.split(":") for line in (await admin.ask("INFO", "cpu")).decode().splitlines() if line[:1] not in ("#", "")
    )
    return (float(fields["used_cpu_user"]) + float(fields["used_cpu_sys"])) * 1e6


async def compare(settings: Settings, hows: list[str], count: int, rounds: int) -> None:
    results: dict[str, list[dict[str, float]]] = {how: [] for how in hows}
    for _ in range(rounds):
        for how in hows:
            results[how].append(await measure(settings, how, count))
    for how, rows in results.items():
        print(f"replies by {how}: median of {rounds} rounds of {count} requests (min - max)")
        for name in rows[0]:
            values = sorted(row[name] for row in rows)
            print(f"  {name:14} {statistics.median(values):10,.2f}   ({values[0]:,.2f} - {values[-1]:,.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server to use; by default a private embedded one")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--replies", choices=["pubsub", "list", "both"], default="pubsub")
    parser.add_argument("--replica", help=argparse.SUPPRESS)
    options = parser.parse_args()
    import uvloop

    if options.replies == "list":
        use_list_replies()
    if options.replica:
        uvloop.run(replica(Settings(options.replica)))
    elif options.replies == "both":
        raise SystemExit("run it once with pubsub and once with list: the script differs per process")
    else:
        uvloop.run(compare(Settings(options.url), [options.replies], options.requests, options.rounds))


if __name__ == "__main__":
    main()
