"""What one request costs the server: commands, scripts and bytes. And that none costs an asyncio task."""

import pytest

from tests.costs.counting import Commands, Tasks, check
from tests.costs.rig import Rig
from tests.costs.workloads import CONCURRENT_CALLS, MAP, MAP_REFS, SERIAL_CALLS, SYNC_MAP, Workload
from tests.servers import AnyServer

pytestmark = pytest.mark.single_server

# Of each request, all replicas and callers together. Behind each bound is what was measured.
BOUNDS: dict[Workload, dict[str, float]] = {
    MAP: {
        "XADD": 1,  # 1
        "SETEX": 1,  # 1
        "other commands in scripts": 0.24,  # 0.204
        "submit scripts": 0.037,  # 0.0315: 32 requests in each
        "claim scripts": 0.002,  # 0.001: the others are direct reads
        "claims and reads": 0.010,  # 0.007: 200 requests in each
        "finish scripts": 0.013,  # 0.0105: 100 requests in each
        "other commands sent": 0.003,  # 0.002: UNLINK of 500 results each
        "bytes to the server": 270,  # 233
        "bytes from the server": 335,  # 289
    },
    SYNC_MAP: {
        "XADD": 1,  # 1
        "SETEX": 1,  # 1
        "other commands in scripts": 0.24,  # 0.204
        "submit scripts": 0.037,  # 0.0315
        "claim scripts": 0.002,  # 0.001: the others are direct reads
        "claims and reads": 0.010,  # 0.007
        "finish scripts": 0.013,  # 0.0105
        "other commands sent": 0.003,  # 0.002
        "bytes to the server": 270,  # 233
        "bytes from the server": 335,  # 289
    },
    CONCURRENT_CALLS: {
        "XADD": 1,  # 1
        "SETEX": 1,  # 1
        "other commands in scripts": 0.56,  # 0.43 to 0.49
        "submit scripts": 0.036,  # 0.0313: 2 for 64 requests, as the first goes out at once
        "claim scripts": 0.038,  # 0.020 to 0.032
        "claims and reads": 0.08,  # 0.052 to 0.068: 5 for 64 requests would be 0.078
        "finish scripts": 0.036,  # 0.0313: 2 for 64 requests
        "other commands sent": 0.004,  # 0.003
        "bytes to the server": 285,  # 240 to 246
        "bytes from the server": 330,  # 281
    },
    SERIAL_CALLS: {
        "XADD": 1,  # 1
        "SETEX": 1,  # 1
        "other commands in scripts": 11.9,  # 11.03: one more would be 12.03
        "submit scripts": 1,  # 1
        "claim scripts": 0.25,  # 0.207: one in five
        "claims and reads": 1.4,  # 1.21
        "finish scripts": 1,  # 1
        "other commands sent": 0.004,  # 0.0033
        "bytes to the server": 1420,  # 1224: two scripts name their 16 keys
        "bytes from the server": 475,  # 400
    },
    MAP_REFS: {
        "XADD": 1,  # 1
        "SETEX": 0,  # 0
        "other commands in scripts": 0.15,  # 0.126
        "submit scripts": 0.037,  # 0.0315: 32 requests in each
        "claims and reads": 0,  # 0
        "finish scripts": 0,  # 0
        "other commands sent": 0.001,  # 0
        "bytes to the server": 94,  # 80
        "bytes from the server": 2,  # 0.06
    },
}
NO_TASKS = {"tasks of the client": 0, "tasks of the replica": 0}  # 0


@pytest.mark.parametrize("workload", BOUNDS, ids=lambda workload: workload.name)
def test_a_request_costs_no_more_commands_and_no_task(
    rig: Rig, server: AnyServer, monkeypatch: pytest.MonkeyPatch, workload: Workload
) -> None:
    with server.connect_blocking() as client:
        commands, tasks = Commands(client, monkeypatch), Tasks(rig)
        rig.hold()

        with tasks.counted(), commands.counted():
            workload.run(rig)
            rig.hold()

    check(workload.name, commands.per_request(workload.requests), BOUNDS[workload], commands)
    check(workload.name, tasks.per_request(workload.requests), NO_TASKS, tasks)


def test_a_request_that_suspends_costs_one_task_of_the_replica(rig: Rig) -> None:
    tasks = Tasks(rig)

    with tasks.counted():
        assert list(rig.sync.suspends.map(range(100))) == list(range(100))

    assert tasks.per_request(100) == {"tasks of the client": 0, "tasks of the replica": 1}, str(tasks)
