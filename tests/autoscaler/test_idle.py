"""When a deployment is idle enough to go to zero."""

from millstream.autoscaler.policy import Memory, decide
from millstream.autoscaler.readings import History, Reading
from millstream.broker.control_scripts import Backlog
from millstream.config import AutoscalingConfig, DeploymentConfig

CONFIG = DeploymentConfig(autoscaling=AutoscalingConfig(min_replicas=0, max_replicas=4, downscale_delay_s=3))


def targets(arrivals_per_tick: list[int]) -> list[int]:
    """What is decided second by second for one replica whose requests are over before anybody looks."""
    history, memory, target, arrivals, decided = History(), Memory(wanted=((0.0, 1),)), 1, 0, []
    for second, arrived in enumerate(arrivals_per_tick):
        arrivals += arrived
        reading = Reading(float(second), Backlog(arrivals=arrivals), running=target, starting=0)
        history.add(reading)
        decision = decide(CONFIG, None, target, reading, history.rates(), memory, list(history.readings))
        target, memory = decision.target, decision.memory
        decided.append(target)
    return decided


def test_short_requests_that_no_reading_sees_keep_a_replica() -> None:
    assert targets([100] * 60) == [1] * 60


def test_it_goes_to_zero_when_they_stop() -> None:
    assert targets([100] * 10 + [0] * 70)[-1] == 0
