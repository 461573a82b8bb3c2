"""What the policies decide, and why: tables, and stories told reading by reading. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from millstream.autoscaler.policy import Decision, Memory, decide
from millstream.autoscaler.readings import History, Rates, Reading
from millstream.broker.control_scripts import Backlog
from millstream.config import AutoscalingConfig, DeploymentConfig

IDLE = Rates(0.0, 0.0, 0.0, None)


def reading(
    at_s: float = 0.0, waiting: int = 0, in_flight: int = 0, arrivals: int = 0, age_s: float | None = None
) -> Reading:
    return Reading(at_s, Backlog(waiting, in_flight, 0, 0, age_s, arrivals), running=1, starting=0)


def scaled(**scaling: Any) -> DeploymentConfig:
    return DeploymentConfig(autoscaling=AutoscalingConfig(**{"max_replicas": 10, **scaling}), max_ongoing_requests=4)


def once(config: DeploymentConfig, target: int | None, now: Reading, rates: Rates = IDLE, **more: Any) -> Decision:
    """One decision, without a past."""
    memory = more.get("memory", Memory(wanted=((now.at_s, target or 0),)))
    return decide(config, more.get("override"), target, now, rates, memory, [now])


@dataclass
class Story:
    """A deployment over time; the policy's memory and the history are carried along."""

    config: DeploymentConfig
    target: int = 0
    memory: Memory = field(default_factory=Memory)
    history: History = field(default_factory=History)
    targets: list[int] = field(default_factory=list)

    def tell(self, readings: Iterable[Reading]) -> list[int]:
        for one in readings:
            self.history.add(one)
            if not self.memory.wanted:
                self.memory = Memory(wanted=((one.at_s, self.target),))
            window = list(self.history.readings)
            decision = decide(self.config, None, self.target, one, self.history.rates(), self.memory, window)
            self.target, self.memory = decision.target, decision.memory
            self.targets.append(self.target)
        return self.targets


# what comes before any policy


def test_a_fixed_number_is_the_number() -> None:
    assert once(DeploymentConfig(num_replicas=3), None, reading(waiting=1000)).target == 3


def test_an_operators_number_goes_before_everything() -> None:
    decision = once(scaled(), 2, reading(waiting=1000), override={"num_replicas": 0})

    assert decision.target == 0
    assert "operator" in decision.reason


def test_an_operators_bounds_replace_those_of_the_config() -> None:
    assert once(scaled(), 1, reading(waiting=1000), override={"min_replicas": 1, "max_replicas": 2}).target == 2


def test_an_operators_bound_may_contradict_a_later_config() -> None:
    assert once(scaled(min_replicas=5), 5, reading(), override={"max_replicas": 2}).target == 5


@pytest.mark.parametrize(
    ("scaling", "first"),
    [({"min_replicas": 2}, 2), ({"min_replicas": 0}, 0), ({"min_replicas": 1, "initial_replicas": 4}, 4)],
)
def test_a_new_deployment_starts_with_initial_or_min_replicas(scaling: dict[str, int], first: int) -> None:
    assert once(scaled(**scaling), None, reading()).target == first


# backlog


@pytest.mark.parametrize(
    ("waiting", "in_flight", "rates", "wanted"),
    [
        (0, 0, Rates(0, 0, 0, None), 0),
        (1, 0, Rates(0, 0, 0, None), 1),
        (7, 7, Rates(0, 0, 0, None), 10),  # 14 requests over 2 slots, used to 70 %
        (0, 4, Rates(8.0, 8.0, 4.0, 0.5), 3),  # 8/s of 0.5 s are 4 at once, over 2 slots, used to 80 %
        (0, 4, Rates(1.0, 8.0, 4.0, 0.5), 2),  # never fewer than what runs now needs
        (16, 4, Rates(8.0, 8.0, 4.0, 0.5), 5),  # 16 of 0.5 s within 2 s need 2 more
        (1000, 4, Rates(8.0, 8.0, 4.0, 0.5), 10),  # max_replicas
    ],
)
def test_backlog_wants_by_littles_law(waiting: int, in_flight: int, rates: Rates, wanted: int) -> None:
    decision = once(scaled(min_replicas=0), 0, reading(waiting=waiting, in_flight=in_flight), rates)

    assert decision.target == wanted


def test_the_reason_and_the_inputs_say_what_decided() -> None:
    decision = once(scaled(), 1, reading(waiting=16, in_flight=4), Rates(8.0, 8.0, 4.0, 0.5))

    assert "8.0 arrivals/s of 500 ms" in decision.reason
    assert decision.inputs["waiting"] == 16
    assert decision.inputs["service_time_s"] == 0.5


def test_from_zero_it_starts_at_once_even_with_a_delay() -> None:
    assert once(scaled(min_replicas=0, upscale_delay_s=60), 0, reading(waiting=1)).target == 1


def test_growth_waits_for_its_delay_unless_the_queue_is_late() -> None:
    config = scaled(upscale_delay_s=10, target_queue_latency_s=1.0)
    story = Story(config, target=1)

    story.tell(reading(float(t), waiting=8, age_s=0.5) for t in range(11))

    assert story.targets[:10] == [1] * 10
    assert story.targets[10] > 1
    assert once(config, 1, reading(waiting=8, age_s=1.5)).target > 1


def test_it_shrinks_only_to_the_most_that_was_wanted_in_the_hold_window() -> None:
    story = Story(scaled(downscale_delay_s=30), target=1)
    story.tell([reading(0.0, waiting=14), reading(1.0, waiting=7), reading(2.0)])
    high = story.target

    story.tell(reading(2.0 + t) for t in range(1, 40))

    assert high == 10
    assert story.targets[30] == 10
    assert story.targets[-1] == 1  # min_replicas


def test_it_goes_to_zero_only_after_its_own_delay() -> None:
    story = Story(scaled(min_replicas=0, downscale_delay_s=2, downscale_to_zero_delay_s=20), target=0)

    story.tell([reading(0.0, waiting=8), *(reading(float(t)) for t in range(1, 30))])

    assert story.targets[5] == 1
    assert story.targets[19] == 1
    assert story.targets[-1] == 0


def test_a_counter_that_starts_over_is_no_negative_rate() -> None:
    history = History()
    for one in (reading(0.0, arrivals=100), reading(1.0, arrivals=200), reading(2.0, arrivals=3)):
        history.add(one)

    assert len(history.readings) == 1
    assert history.rates() == IDLE


def test_rates_follow_from_the_counters() -> None:
    history = History()
    for t in range(6):
        history.add(reading(float(t), in_flight=4, arrivals=4 + 8 * t))

    rates = history.rates()

    assert rates.arrivals_per_s == 8.0
    assert rates.completions_per_s == 8.0
    assert rates.service_time_s == pytest.approx(0.5)  # 4 in flight at 8 a second


def test_delayed_requests_that_are_due_count_as_waiting() -> None:
    due = Reading(0.0, Backlog(due=3), running=0, starting=0)

    assert once(scaled(min_replicas=0), 0, due).target > 0


# ray


def test_ray_goes_from_zero_at_once_by_its_factor() -> None:
    config = scaled(policy="ray", min_replicas=0, upscaling_factor=2.5, upscale_delay_s=30)

    assert once(config, 0, reading(waiting=1)).target == 3


def test_ray_grows_by_mean_ongoing_after_its_delay() -> None:
    story = Story(scaled(policy="ray", upscale_delay_s=5, look_back_period_s=2), target=1)

    story.tell(reading(float(t), in_flight=8) for t in range(8))

    assert story.targets[4] == 1
    assert story.targets[-1] == 4  # 8 ongoing, 2 each


def test_ray_shrinks_to_one_first_and_to_zero_after_its_own_delay() -> None:
    config = scaled(
        policy="ray", min_replicas=0, downscale_delay_s=3, downscale_to_zero_delay_s=6, look_back_period_s=1
    )
    story = Story(config, target=4)

    story.tell(reading(float(t)) for t in range(15))

    assert story.targets[2] == 4
    assert 1 in story.targets
    assert story.targets.index(0) > story.targets.index(1) + 5


def test_ray_forgets_its_delay_when_the_direction_changes() -> None:
    story = Story(scaled(policy="ray", upscale_delay_s=3, look_back_period_s=0.5), target=2)

    story.tell(reading(float(t), in_flight=8 if t % 3 else 4) for t in range(12))

    assert set(story.targets) == {2}
