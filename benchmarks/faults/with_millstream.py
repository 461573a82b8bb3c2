"""millstream, two replicas of four requests, all settings as they come (lease 5 s)."""

import asyncio

from benchmarks.faults.ledger import note, send_all
from millstream import serve


@serve.deployment(num_replicas=2, max_ongoing_requests=4)
class Work:
    async def __call__(self, name: str, seconds: float) -> None:
        note("start", name)
        await asyncio.sleep(seconds)
        note("end", name)


app = Work.bind()

if __name__ == "__main__":
    handle = serve.get_deployment_handle("Work", sync=True).options(block_until="queued")
    send_all(handle.remote)
