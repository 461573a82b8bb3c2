"""Work of about 5 ms that holds its processor, on one replica and on several."""

import time

from benchmarks.peers.measure import run, say
from benchmarks.suite.how import How
from benchmarks.suite.served import Burn, burn
from benchmarks.suite.timing import rate
from millstream import serve

REPLICAS = (1, 2, 4)
WORK_S = 0.005
TRY = 20_000  # loops


def measure(how: How) -> None:
    for number in REPLICAS:
        serve.run(Burn.options(num_replicas=number).bind(), name=f"on{number}")
    run(rates(how, loops_for(WORK_S)))


def loops_for(seconds: float) -> int:
    """By the fastest of some tries: the others were disturbed."""
    return round(TRY * seconds / min(_burn_s() for _ in range(20)))


def _burn_s() -> float:
    began = time.perf_counter()
    burn(TRY)
    return time.perf_counter() - began


async def rates(how: How, loops: int) -> None:
    found: dict[int, float] = {}
    for number in REPLICAS:
        handle = serve.get_deployment_handle("Burn", f"on{number}")

        async def everything(values: range, handle: serve.DeploymentHandle = handle) -> None:
            assert [x async for x in handle.map([loops] * len(values))] == [loops] * len(values)

        found[number] = await rate(everything, how.seconds)
        say(**{f"on {number}": found[number], f"on {number}, speed-up": found[number] / found[1]})
