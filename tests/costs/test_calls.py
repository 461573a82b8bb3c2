"""What one request costs in Python: calls of functions, which are as many on a slow machine as on a fast one."""

import pytest

from tests.costs.counting import Calls, check
from tests.costs.rig import Rig
from tests.costs.workloads import CONCURRENT_CALLS, MAP, MAP_REFS, REFILLED_MAP, SERIAL_CALLS, SYNC_MAP, Workload

pytestmark = pytest.mark.single_server

# Of each request. Behind each bound is what was measured, with Python 3.11; later ones make fewer calls of the same code.
BOUNDS: dict[Workload, dict[str, float]] = {
    MAP: {
        "calls by the client": 39,  # 33.5
        "calls by the replica": 35,  # 29.8
    },
    REFILLED_MAP: {
        "calls by the client": 40,  # 34.5
        "calls by the replica": 35,  # 29.8
    },
    SYNC_MAP: {
        "calls by the client": 39,  # 33.4
        "calls by the replica": 35,  # 29.8
    },
    CONCURRENT_CALLS: {
        "calls by the client": 57,  # 48.3
        "calls by the replica": 37,  # 31.1 to 32.2
    },
    SERIAL_CALLS: {
        "calls by the client": 118,  # 102
        "calls by the replica": 130,  # 112
    },
    MAP_REFS: {
        "calls by the client": 36,  # 30.3
        "calls by the replica": 0.1,  # 0.01
    },
}


@pytest.mark.parametrize("workload", BOUNDS, ids=lambda workload: workload.name)
def test_a_request_costs_no_more_calls(rig: Rig, workload: Workload) -> None:
    calls = Calls(rig)
    rig.hold()

    with calls.counted():
        workload.run(rig)
        rig.hold()

    check(workload.name, calls.per_request(workload.requests), BOUNDS[workload], calls)
