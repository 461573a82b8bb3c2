"""What each further replica of a small deployment takes: of nine, after each has worked."""

import statistics

from benchmarks.peers.measure import say
from benchmarks.suite.how import How
from benchmarks.suite.parties import memory_mib, replicas
from benchmarks.suite.served import NoOp
from millstream import serve

SIBLINGS = 8
WORK = 5_000  # requests, together


def measure(how: How) -> None:
    handle = serve.run(NoOp.options(num_replicas=1 + SIBLINGS).bind())
    assert list(handle.map(range(WORK))) == list(range(WORK))
    found = [memory_mib(pid) for pid in replicas()]
    assert len(found) == 1 + SIBLINGS
    say(**{f"replica, {kind}": statistics.median(each[kind] for each in found) for kind in found[0]})
