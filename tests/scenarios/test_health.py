"""check_health and __del__ on real processes."""

# mypy: disable-error-code="attr-defined"
# (mypy does not apply what a class decorator returns: https://github.com/python/mypy/issues/3135)

import os
from pathlib import Path

import pytest

import millstream
from millstream import serve
from millstream.errors import DeployFailedError, ReplicaDiedError
from millstream.status import DeploymentStatus
from tests.scenarios.processes import wait_for
from tests.scenarios.tuned import Patient

pytestmark = pytest.mark.processes


def status() -> DeploymentStatus:
    return serve.status().applications["default"].deployments["Patient"]


def pids() -> set[int]:
    return {replica.pid for replica in status().replicas if replica.state == "RUNNING"}


def test_replica_that_fails_its_checks_is_replaced_and_its_requests_go_elsewhere(tmp_path: Path) -> None:
    handle = serve.run(Patient.options(num_replicas=2, health_check_period_s=0.05).bind(str(tmp_path)))
    wait_for(lambda: len(pids()) == 2)
    refs = [handle.hold.remote(str(tmp_path / "go")) for _ in range(8)]
    ill = handle.pid.call()

    (tmp_path / f"ill-{ill}").touch()
    wait_for(lambda: ill not in pids() and len(pids()) == 2, what="another replica")
    (tmp_path / "go").touch()

    assert ill not in {pid for pid in millstream.get(refs, timeout=10)}
    death = status().last_death
    assert death is not None
    assert death["cause"] == "killed: its check_health failed 3 times in a row, at last with OSError: no GPU"


def test_requests_that_may_not_run_again_learn_why(tmp_path: Path) -> None:
    handle = serve.run(Patient.options(max_attempts=1, health_check_period_s=0.05).bind(str(tmp_path)))
    ref = handle.hold.remote(str(tmp_path / "go"))

    (tmp_path / f"ill-{handle.pid.call()}").touch()

    with pytest.raises(ReplicaDiedError, match="check_health failed 3 times in a row, at last with OSError: no GPU"):
        ref.result(timeout=10)


@pytest.mark.parametrize("how", ["raise", "hang"])
def test_check_that_fails_from_the_start_ends_in_deploy_failed(tmp_path: Path, how: str) -> None:
    (tmp_path / how).touch()

    with pytest.raises(DeployFailedError, match=r"its first check_health failed: .* \(3 times in a row\)"):
        serve.run(Patient.options(health_check_timeout_s=0.3).bind(str(tmp_path)))


def test_check_that_hangs_in_its_thread_is_a_failed_one(tmp_path: Path) -> None:
    deployment = Patient.options(health_check_period_s=0.05, health_check_timeout_s=0.2)
    handle = serve.run(deployment.bind(str(tmp_path)))
    ill = handle.pid.call()

    (tmp_path / "hang").touch()
    wait_for(lambda: ill not in pids(), what="the end of the replica")
    (tmp_path / "hang").unlink()

    assert handle.pid.call() != ill
    death = status().last_death
    assert death is not None and death["cause"].endswith("no answer within health_check_timeout_s=0.2")


def test_object_says_goodbye_when_its_replica_leaves_and_not_when_it_is_killed(tmp_path: Path) -> None:
    handle = serve.run(Patient.options(num_replicas=2).bind(str(tmp_path)))
    wait_for(lambda: len(pids()) == 2)
    both = pids()
    killed = handle.pid.call()
    os.kill(killed, 9)
    wait_for(lambda: killed not in pids() and len(pids()) == 2)

    serve.delete("default")

    left = {int(path.name.removeprefix("left-")) for path in tmp_path.glob("left-*")}
    assert killed not in left and both - {killed} < left and len(left) == 2
