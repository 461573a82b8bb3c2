"""What it costs to have nothing to do: two replicas, and a deployment at zero."""

import time

from benchmarks.peers.measure import say
from benchmarks.suite.how import How
from benchmarks.suite.parties import OURS, Meter, parties
from benchmarks.suite.served import NoOp
from millstream import serve

SETTLE_S = 3.0


def measure(how: How) -> None:
    at_zero = NoOp.options(name="AtZero", autoscaling_config={"min_replicas": 0, "max_replicas": 1})
    handle = serve.run(NoOp.options(num_replicas=2).bind(at_zero.bind()))
    assert handle.call(1) == 1
    time.sleep(min(SETTLE_S, how.idle_s))
    meter, began = Meter(**parties()), time.perf_counter()
    time.sleep(how.idle_s)
    took_s = time.perf_counter() - began
    percent = {party: used / took_s / 1e4 for party, used in meter.used_us().items()}
    say(idle=sum(percent[party] for party in OURS), **{f"idle, {party}": each for party, each in percent.items()})
