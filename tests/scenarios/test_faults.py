"""Real kills: of a replica in mid-request, of the launcher, of the autoscaler, of the owner, of a caller, of the server."""

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest

import millstream
from millstream import serve
from millstream.broker.registry import Registry
from millstream.errors import ReplicaDiedError
from millstream.handles.ref import ObjectRef
from millstream.runtime import with_registry
from tests.scenarios.apps import Worker
from tests.scenarios.processes import descendants, find, me, wait_for, wait_for_end

pytestmark = pytest.mark.processes


def starts(ledger: Path) -> list[tuple[str, int]]:
    """(request, pid) of every attempt that was started."""
    return [(name, int(pid)) for name, pid in (line.split() for line in ledger.read_text().splitlines())]


def send(name: str, method: str, go: Path) -> ObjectRef:
    handle = serve.get_deployment_handle("Worker", sync=True)
    return handle.options(method_name=method, block_until="queued").remote(name, str(go))


def replica_states() -> dict[str, int]:
    return serve.status().applications["default"].deployments["Worker"].replica_states


def running_replicas() -> int:
    return replica_states().get("RUNNING", 0)


@pytest.mark.parametrize("method", ["hold", "block"])
def test_a_killed_replicas_request_finishes_elsewhere_within_a_second(
    tmp_path: Path, ledger: Path, method: str
) -> None:
    serve.run(Worker.options(num_replicas=2).bind(str(ledger)))
    wait_for(lambda: running_replicas() == 2)
    ref = send("a", method, tmp_path / "go")
    wait_for(lambda: starts(ledger))
    (_, victim) = starts(ledger)[0]

    killed_at = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(starts(ledger)) == 2, 2.0, "a second attempt")
    takeover_s = time.monotonic() - killed_at
    (tmp_path / "go").touch()

    assert millstream.get(ref, timeout=5)[1] != victim
    assert takeover_s < 1.0
    assert [name for name, _ in starts(ledger)] == ["a", "a"]


def test_a_replica_that_is_told_to_end_finishes_what_it_runs(tmp_path: Path, ledger: Path) -> None:
    serve.run(Worker.bind(str(ledger)))
    ref = send("a", "hold", tmp_path / "go")
    wait_for(lambda: starts(ledger))
    ((_, told),) = starts(ledger)

    os.kill(told, signal.SIGTERM)
    wait_for(lambda: "DRAINING" in replica_states(), what="it to drain")
    (tmp_path / "go").touch()

    assert millstream.get(ref, timeout=5) == ("a", told)


def test_everything_a_killed_replica_held_runs_again_and_nothing_else(tmp_path: Path, ledger: Path) -> None:
    serve.run(Worker.options(num_replicas=2, max_ongoing_requests=10).bind(str(ledger)))
    wait_for(lambda: running_replicas() == 2)
    refs = [send(str(n), "hold", tmp_path / "go") for n in range(20)]
    wait_for(lambda: len(starts(ledger)) == 20)
    victim = starts(ledger)[0][1]
    lost = {name for name, pid in starts(ledger) if pid == victim}

    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(starts(ledger)) == 20 + len(lost), 5.0)
    (tmp_path / "go").touch()
    millstream.get(refs, timeout=10)

    runs = Counter(name for name, _ in starts(ledger))
    assert {name for name, count in runs.items() if count == 2} == lost
    assert set(runs.values()) <= {1, 2}


def test_a_request_whose_replicas_always_die_ends_as_a_dead_letter(tmp_path: Path, ledger: Path) -> None:
    serve.run(Worker.options(num_replicas=2, max_attempts=2).bind(str(ledger)))
    ref = send("poison", "hold", tmp_path / "never")

    for attempt in (1, 2):
        wait_for(lambda attempt=attempt: len(starts(ledger)) == attempt)  # type: ignore[misc]
        os.kill(starts(ledger)[-1][1], signal.SIGKILL)

    with pytest.raises(ReplicaDiedError, match="SIGKILL") as caught:
        ref.result(timeout=5)
    assert [attempt["attempt"] for attempt in caught.value.attempts] == [1, 2]

    async def dead(registry: Registry) -> int:
        return await registry.dead_count("default.Worker")

    assert with_registry(dead) == 1


def test_after_the_launcher_is_killed_nothing_runs_twice(tmp_path: Path, ledger: Path) -> None:
    serve.run(Worker.options(num_replicas=2, max_ongoing_requests=4).bind(str(ledger)))
    wait_for(lambda: running_replicas() == 2)
    refs = [send(str(n), "hold", tmp_path / "go") for n in range(8)]
    wait_for(lambda: len(starts(ledger)) == 8)
    (launcher,) = find(me(), "millstream: launcher")
    replicas = {pid for _, pid in starts(ledger)}

    os.kill(launcher, signal.SIGKILL)
    wait_for_end([launcher], 5.0)
    later = [send(f"later-{n}", "hold", tmp_path / "go") for n in range(4)]
    wait_for(lambda: find(me(), "millstream: launcher"), what="another launcher")
    (tmp_path / "go").touch()
    done = millstream.get([*refs, *later], timeout=30)

    assert all(pid in replicas for _, pid in done[:8])
    assert set(Counter(name for name, _ in starts(ledger)).values()) == {1}
    assert wait_for_end(replicas, 10.0) == set()


def test_requests_go_on_while_the_autoscaler_is_dead() -> None:
    handle = serve.run(Worker.bind())
    (autoscaler,) = find(me(), "millstream: autoscaler")

    os.kill(autoscaler, signal.SIGKILL)

    assert [handle.echo.call(n) for n in range(50)] == list(range(50))


def test_a_dead_autoscaler_is_replaced_and_goes_on_with_the_same_targets() -> None:
    serve.run(Worker.options(num_replicas=2).bind())
    wait_for(lambda: running_replicas() == 2)
    (autoscaler,) = find(me(), "millstream: autoscaler")

    os.kill(autoscaler, signal.SIGKILL)
    wait_for(lambda: find(me(), "millstream: autoscaler") not in ([], [autoscaler]), what="another autoscaler")
    with_registry(lambda registry: registry.override("default.Worker", {"num_replicas": 3}))

    wait_for(lambda: running_replicas() == 3, 15.0)


OWNER = """
import sys, time
from millstream import serve
from tests.scenarios.apps import Worker

handle = serve.run(Worker.options(num_replicas=2).bind({ledger!r}))
{body}
print("ready", flush=True)
{end}
"""


def start_owner(
    script: Callable[[str], "Popen[str]"], ledger: Path, body: str = "", end: str = "time.sleep(60)"
) -> "tuple[Popen[str], set[int]]":
    process = script(OWNER.format(ledger=str(ledger), body=body, end=end))
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "ready":
            break
    return process, descendants(process.pid)


def test_nothing_is_left_when_the_owner_is_killed(
    script: Callable[[str], "Popen[str]"], ledger: Path, cluster_url: str
) -> None:
    process, tree = start_owner(script, ledger)
    assert len(tree) >= (4 if cluster_url else 6)  # guard, server, launcher, autoscaler, warm parent, replicas

    process.kill()

    assert wait_for_end(tree, 15.0) == set()


def test_nothing_is_left_when_the_owner_is_killed_with_a_request_running(
    script: Callable[[str], "Popen[str]"], tmp_path: Path, ledger: Path
) -> None:
    go = str(tmp_path / "go")
    process, tree = start_owner(script, ledger, f"handle.options(method_name='hold').remote('a', {go!r})")
    wait_for(lambda: starts(ledger))

    process.kill()
    (tmp_path / "go").touch()

    assert wait_for_end(tree, 15.0) == set()


def test_nothing_is_left_when_the_owner_just_ends(script: Callable[[str], "Popen[str]"], ledger: Path) -> None:
    process, tree = start_owner(script, ledger, end="")

    assert process.wait(20) == 0
    assert wait_for_end(tree, 5.0) == set()


def test_nothing_is_left_after_ctrl_c(script: Callable[[str], "Popen[str]"], ledger: Path) -> None:
    process, tree = start_owner(script, ledger)

    process.send_signal(signal.SIGINT)
    process.wait(20)

    assert wait_for_end(tree, 5.0) == set()


@pytest.mark.single_server
def test_nothing_is_left_when_the_guard_of_the_server_is_killed_too(
    script: Callable[[str], "Popen[str]"], ledger: Path
) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux tells a child of its parent's death")
    process, tree = start_owner(script, ledger)
    (guard,) = find(process.pid, "millstream/guard.py")

    os.kill(guard, signal.SIGKILL)
    process.kill()

    assert wait_for_end(tree, 40.0) == set()


def test_a_stopped_replica_loses_its_requests_and_cannot_finish_them_later(tmp_path: Path, ledger: Path) -> None:
    serve.run(Worker.options(num_replicas=2, health_check_timeout_s=3.0).bind(str(ledger)))
    wait_for(lambda: running_replicas() == 2)
    ref = send("a", "hold", tmp_path / "go")
    wait_for(lambda: starts(ledger))
    (_, frozen) = starts(ledger)[0]

    os.kill(frozen, signal.SIGSTOP)
    wait_for(lambda: len(starts(ledger)) == 2, 15.0, "a second attempt")
    (tmp_path / "go").touch()

    assert millstream.get(ref, timeout=5)[1] != frozen
    assert wait_for_end([frozen], 5.0) == set()
