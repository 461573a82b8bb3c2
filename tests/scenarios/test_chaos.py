"""A minute of chaos, every kind of fault in it: nothing is lost, doubled without a cause, or left hanging."""

from pathlib import Path

import pytest

from chaos.plan import Harm, ServerFaults, mix
from chaos.report import as_text
from chaos.run import run
from chaos.world import Load

pytestmark = [pytest.mark.processes, pytest.mark.single_server, pytest.mark.timeout(400)]


def test_nothing_is_lost_in_a_minute_of_chaos(tmp_path: Path) -> None:
    load = Load(seed=1, requests=4000, clients=3, rate=80.0)

    outcome = run(tmp_path / "chaos", load, mix(load.duration_s), ServerFaults.ORDERLY, say=print)

    verdict = outcome.verdict
    print(as_text(verdict, outcome.faults, "seed 1"))
    assert verdict.is_good
    assert verdict.near_a_loss == []
    assert verdict.requests >= 4000
    assert {fault.harm for fault in outcome.faults} == set(Harm)
