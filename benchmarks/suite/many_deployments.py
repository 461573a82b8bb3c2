"""A thousand deployments of which ten are called: beside 990 at zero, and the same ten alone."""

import asyncio
import time
from itertools import cycle
from typing import Any

from benchmarks.peers.measure import CALLERS, callers_rate, run, say
from benchmarks.suite.how import How
from benchmarks.suite.parties import Meter, parties
from benchmarks.suite.served import NoOp
from millstream import serve

ACTIVE = 10
AT_ZERO = {"min_replicas": 0, "max_replicas": 1}
SETTLE_S = 3.0  # processes that have just started are busy with themselves


def measure(how: How) -> None:
    serve.run(several(ACTIVE), name="active")
    run(calls("alone", how))
    began = time.perf_counter()
    serve.run(several(how.deployments - ACTIVE, autoscaling_config=AT_ZERO), name="idle")
    say(**{"many, deploy": time.perf_counter() - began})
    run(calls("many", how))


def several(number: int, **options: Any) -> Any:
    """One application of so many deployments: stored together, and one warm parent for all."""
    first, *others = (NoOp.options(name=f"D{n}", **options) for n in range(number))
    return first.bind(*[each.bind() for each in others])


async def calls(name: str, how: How) -> None:
    """Requests per second of the ten in turn, and how much of a core each party takes meanwhile."""
    await asyncio.sleep(SETTLE_S)
    handles = [serve.get_deployment_handle(f"D{n}", "active") for n in range(ACTIVE)]
    assert [await handle.call(1) for handle in handles] == [1] * ACTIVE
    turns, found = cycle(handles), parties()
    meter = Meter(launcher=found["launcher"], autoscaler=found["autoscaler"], server=found["server"])
    began = time.perf_counter()
    say(**{name: await callers_rate(lambda x: next(turns).call(x), 1, CALLERS, 2 * how.seconds)})
    took_s = time.perf_counter() - began
    say(**{f"{name}, {party}": used / took_s / 1e4 for party, used in meter.used_us().items()})
