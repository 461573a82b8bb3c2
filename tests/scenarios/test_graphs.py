"""Graphs of requests over real processes: they run on whatever dies, and every request of them runs once."""

# mypy: disable-error-code="attr-defined"
# (mypy does not apply what a class decorator returns: https://github.com/python/mypy/issues/3135)

import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest

from millstream import serve
from millstream.broker.states import State
from millstream.handles import engines
from millstream.handles.ref import ObjectRef
from tests.scenarios.apps import DiesBeforeItSupplies, Worker
from tests.scenarios.processes import wait_for

pytestmark = pytest.mark.processes

SUBMITTER = """
import asyncio, os, sys, time
os.environ.update({environment!r})
from millstream import serve

async def main():
    first = serve.get_deployment_handle("Worker", "first")
    second = serve.get_deployment_handle("Worker", "second")
    slow = first.hold.remote("slow", {go!r})
    left, right = second.note.remote("left", slow), first.note.remote("right", slow, slow)
    last = second.note.remote("last", left, right)
    inside = second.await_inside.remote("inside", [first.note.remote("deep", left), right])
    print((await last).id, (await inside).id, flush=True)
    time.sleep(60)

asyncio.run(main())
"""


def names(ledger: Path) -> list[str]:
    return [line.split()[0] for line in ledger.read_text().splitlines()]


def test_graph_runs_on_when_its_submitter_is_killed(
    script: Callable[[str], "Popen[str]"], tmp_path: Path, ledger: Path
) -> None:
    go = tmp_path / "go"
    for name in ("first", "second"):
        serve.run(Worker.bind(str(ledger)), name=name)
    submitter = script(SUBMITTER.format(environment=engines.settings().to_environment(), go=str(go)))
    assert submitter.stdout is not None
    last, inside = [ObjectRef.from_id(ref_id) for ref_id in submitter.stdout.readline().split()]
    wait_for(lambda: "slow" in names(ledger))
    assert last.status() == State.PARKED

    submitter.send_signal(signal.SIGKILL)
    assert submitter.wait(10) == -signal.SIGKILL
    go.touch()

    ((left,), (right, _)) = last.result(10)
    assert left == right and left[0] == "slow"
    assert inside.result(10) == [((left,),), (left, left)]
    assert sorted(names(ledger)) == ["deep", "inside", "last", "left", "right", "slow"]


def test_request_whose_upstream_died_after_its_finish_is_supplied_and_runs_once(tmp_path: Path, ledger: Path) -> None:
    go = tmp_path / "go"
    worker, fragile = serve.run(Worker.bind(str(ledger))), serve.run(DiesBeforeItSupplies.bind(), name="fragile")
    victim = fragile.pid.call()
    upstream = fragile.hold.remote("value", str(go))
    dependants = [worker.note.remote(str(n), upstream) for n in range(5)]

    go.touch()

    assert upstream.result(10) == "value"
    assert [one.result(15) for one in dependants] == [("value",)] * 5
    assert sorted(names(ledger)) == [str(n) for n in range(5)]
    assert upstream.status() == State.SUCCEEDED
    assert fragile.pid.call() != victim, "it was killed"
