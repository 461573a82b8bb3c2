"""The floor's worker: takes many requests at once, drives each coroutine in place, answers the batch with one write."""

import asyncio
import pickle
import sys
from typing import Any

import uvloop

from benchmarks.floor.wire import REPLIES, REQUESTS, Link, connect, pack

MOST = 500
READ = pack(("XREADGROUP", "GROUP", "g", "w", "COUNT", MOST, "BLOCK", 0, "NOACK", "STREAMS", REQUESTS, ">"))


async def echo(x: Any) -> Any:
    return x


class Worker:
    def __init__(self) -> None:
        self.link: Link

    async def run(self, port: int) -> None:
        self.link = await connect(port, self.on_reply)
        self.link.write(pack(("XGROUP", "CREATE", REQUESTS, "g", 0, "MKSTREAM")) + READ)
        await asyncio.Event().wait()  # it is killed

    def on_reply(self, reply: Any) -> None:
        if type(reply) is not list:
            return  # of an RPUSH
        out = []
        for _, fields in reply[0][1]:
            args, kwargs = pickle.loads(fields[3])
            try:
                echo(*args, **kwargs).send(None)
            except StopIteration as done:
                out.append(pack(("RPUSH", REPLIES, fields[1] + pickle.dumps(done.value, 5))))
        out.append(READ)
        self.link.write(b"".join(out))


if __name__ == "__main__":
    uvloop.run(Worker().run(int(sys.argv[1])))
