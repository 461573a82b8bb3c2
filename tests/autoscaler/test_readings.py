"""From a history of readings to rates: what arrives, what ends, and how long it takes. Pure."""

import random

import pytest

from millstream.autoscaler.readings import FAST_S, SLOW_S, History, Rates, Reading
from millstream.broker.control_scripts import Backlog


def reading(at_s: float, arrivals: int = 0, waiting: int = 0, in_flight: int = 0, due: int = 0) -> Reading:
    return Reading(at_s, Backlog(waiting, in_flight, 0, 0, None, arrivals, due), running=1, starting=0)


def history(*readings: Reading) -> History:
    made = History()
    for one in readings:
        made.add(one)
    return made


def test_what_waits_is_what_is_queued_and_what_is_due() -> None:
    assert (reading(0, waiting=3, due=2).waiting, reading(0, in_flight=4).in_flight) == (5, 4)


def test_what_has_ended_is_what_arrived_and_is_not_there_any_more() -> None:
    assert reading(0, arrivals=10, waiting=3, in_flight=2).ended == 5


def test_one_reading_gives_no_rates() -> None:
    assert history(reading(0, arrivals=100, waiting=100)).rates() == Rates(0.0, 0.0, 0.0, None)


def test_two_readings_at_the_same_time_give_no_rates() -> None:
    assert history(reading(5, arrivals=1), reading(5, arrivals=9)).rates().arrivals_per_s == 0.0


def test_steady_flow_gives_its_own_rate_and_service_time() -> None:
    rates = history(*[reading(t, arrivals=10 * t, in_flight=5 if t else 0) for t in range(10)]).rates()

    assert rates.arrivals_per_s == 10.0
    assert rates.completions_per_s == pytest.approx(85 / 9)
    assert rates.service_time_s == pytest.approx(4.5 / (85 / 9))


def test_service_time_is_unknown_while_nothing_ends() -> None:
    rates = history(reading(0), reading(1, arrivals=4, in_flight=4), reading(2, arrivals=4, in_flight=4)).rates()

    assert (rates.completions_per_s, rates.service_time_s) == (0.0, None)


def test_arrivals_are_the_larger_of_what_came_lately_and_over_a_minute() -> None:
    burst_then_quiet = history(reading(0), reading(1, arrivals=600), *[reading(t, arrivals=600) for t in range(2, 60)])
    quiet_then_burst = history(*[reading(t) for t in range(59)], reading(59, arrivals=100))

    assert burst_then_quiet.rates().arrivals_per_s == pytest.approx(600 / 59)
    assert quiet_then_burst.rates().arrivals_per_s == pytest.approx(100 / FAST_S)


def test_history_forgets_after_a_minute() -> None:
    made = history(*[reading(float(t), arrivals=t) for t in range(200)])

    assert made.readings[0].at_s == 199 - SLOW_S
    assert len(made.readings) == SLOW_S + 1


def test_counter_that_went_backwards_starts_the_history_over() -> None:
    made = history(reading(0, arrivals=500), reading(1, arrivals=510), reading(2, arrivals=3))

    assert [one.at_s for one in made.readings] == [2]


def test_requests_taken_back_from_the_dead_are_no_arrivals_and_no_completions() -> None:
    """They go from in flight to waiting; the counter of arrivals does not know the lane they wait in."""
    rates = history(reading(0, arrivals=8, in_flight=8), reading(1, arrivals=8, waiting=8)).rates()

    assert (rates.arrivals_per_s, rates.completions_per_s) == (0.0, 0.0)


@pytest.mark.parametrize("seed", range(20))
def test_rates_are_never_negative(seed: int) -> None:
    rng = random.Random(seed)
    made, arrivals = History(), 0
    for t in range(100):
        arrivals = rng.choice([arrivals + rng.randrange(20), arrivals, rng.randrange(10)])
        waiting = rng.randrange(arrivals + 1)
        made.add(reading(t * rng.random(), arrivals, waiting, rng.randrange(arrivals - waiting + 1)))
        rates = made.rates()

        assert min(rates.arrivals_per_s, rates.completions_per_s, rates.mean_in_flight) >= 0
        assert rates.service_time_s is None or rates.service_time_s > 0
