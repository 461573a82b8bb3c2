"""Processes that play a part and are killed in the middle of it: `python -m tests.broker.actors PART URL`.

Each prints a line when it has come to where it may be killed.
"""

import sys
from itertools import count

import anyio
import anyio.lowlevel

from millstream.broker import scripts
from millstream.broker.cluster import dial_everywhere
from millstream.broker.keys import GROUP, DeploymentKeys
from millstream.broker.link import Link
from millstream.config import Settings
from tests.helpers import REPLICA, attempts_of, request

BATCH = 50
AT_MOST = 50_000


async def claim_and_hang(link: Link, keys: DeploymentKeys) -> None:
    """Take everything, and never finish it."""
    await link.run(scripts.claim(keys, REPLICA, 100))
    say("claimed")
    await anyio.sleep_forever()


async def block(link: Link, keys: DeploymentKeys) -> None:
    """Wait for work as an idle replica does; prints the id of the connection."""
    streams = (*keys.lanes, *(">" for _ in keys.lanes))
    taken = link.ask("XREADGROUP", "GROUP", GROUP, REPLICA, "COUNT", 1, "BLOCK", 60_000, "STREAMS", *streams)
    say(str(link.client_id))
    await taken


async def finish_one_by_one(link: Link, keys: DeploymentKeys) -> None:
    """Take everything and finish it without ever waiting for an answer."""
    _, taken = await link.run(scripts.claim(keys, REPLICA, AT_MOST))
    for one in attempts_of(keys, taken):
        outcome = (one.entry, one.ref, "", "succeeded", b"of the killed replica")
        link.start(scripts.finish(keys, one.lane, 60, outcome), lambda reply: None)
        await anyio.lowlevel.checkpoint()
    say("finished")
    await anyio.sleep_forever()


async def emit_endlessly(link: Link, keys: DeploymentKeys) -> None:
    """Take one request and produce item after item, in batches, without ever waiting for an answer."""
    _, taken = await link.run(scripts.claim(keys, REPLICA, 1))
    (one,) = attempts_of(keys, taken)
    for first in count(0, BATCH):
        if first > AT_MOST:
            await anyio.sleep_forever()
        items = [f"first {number}".encode() for number in range(first, first + BATCH)]
        call = scripts.emit(keys, one.ref, f"{one.lane} {one.entry.decode()}", b"", 3600, first, items)
        link.start(call, lambda reply: None)
        await anyio.lowlevel.checkpoint()


async def write_and_finish(link: Link, keys: DeploymentKeys) -> None:
    """Take everything; finish each with a large value, without ever waiting for an answer."""
    _, taken = await link.run(scripts.claim(keys, REPLICA, AT_MOST))
    for one in attempts_of(keys, taken):
        link.ask("SET", keys.value(one.ref, one.entry.decode()), b"x" * 5000 + b"y" * 5000, "PX", 60_000)
        outcome = (one.entry, one.ref, "", "succeeded", b"@10000")
        link.start(scripts.finish(keys, one.lane, 60, outcome), lambda reply: None)
        await anyio.lowlevel.checkpoint()
    say("finished")
    await anyio.sleep_forever()


async def submit_endlessly(link: Link, keys: DeploymentKeys) -> None:
    """Submit batch after batch, refs 1, 2, 3, ..., without ever waiting for an answer."""
    for first in count(1, BATCH):
        if first > AT_MOST:
            await anyio.sleep_forever()
        batch = [part for number in range(first, first + BATCH) for part in request(f"{number:022d}", body=b"x" * 500)]
        link.start(scripts.submit(keys, "", batch), lambda reply: None)
        await anyio.lowlevel.checkpoint()


def say(line: str) -> None:
    print(line, flush=True)


PARTS = {
    part.__name__: part
    for part in (claim_and_hang, block, finish_one_by_one, write_and_finish, emit_endlessly, submit_endlessly)
}


async def main(part: str, url: str) -> None:
    keys = DeploymentKeys("ms", "app.Model")
    link = await dial_everywhere(Settings(url), "actor", near=keys.prefix)
    await PARTS[part](link, keys)


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], sys.argv[2])
