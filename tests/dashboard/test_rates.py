import pytest

from millstream.broker.control_scripts import Backlog
from millstream.dashboard.rates import WINDOW_MS, Rates, RateWindow


def test_one_look_has_no_rates() -> None:
    assert RateWindow().add(1000, Backlog(arrivals=7)) == Rates(None, None)


def test_rates_are_differences_of_the_counters_over_the_server_s_time() -> None:
    window = RateWindow()
    window.add(1000, Backlog(arrivals=100, waiting=10, in_flight=5))

    rates = window.add(3000, Backlog(arrivals=140, waiting=30, in_flight=5))

    assert rates == Rates(arrivals_per_s=20.0, completions_per_s=10.0)


def test_looks_older_than_the_window_are_forgotten() -> None:
    window = RateWindow()
    window.add(0, Backlog(arrivals=0))
    window.add(2000, Backlog(arrivals=1000))

    rates = window.add(WINDOW_MS + 1000, Backlog(arrivals=1000))

    assert rates.arrivals_per_s == 0.0


def test_first_look_after_a_long_pause_has_no_rates() -> None:
    window = RateWindow()
    window.add(0, Backlog(arrivals=0))

    assert window.add(3_600_000, Backlog(arrivals=5000)) == Rates(None, None)


@pytest.mark.parametrize(("at_ms", "arrivals"), [(2000, 3), (500, 200), (1000, 100)])
def test_counter_or_clock_that_went_back_starts_over(at_ms: int, arrivals: int) -> None:
    window = RateWindow()
    window.add(1000, Backlog(arrivals=100))

    assert window.add(at_ms, Backlog(arrivals=arrivals)) == Rates(None, None)
    assert window.add(at_ms + 1000, Backlog(arrivals=arrivals + 4)).arrivals_per_s == 4.0


def test_completions_are_never_negative() -> None:
    window = RateWindow()
    window.add(0, Backlog(arrivals=10))

    assert window.add(1000, Backlog(arrivals=10, waiting=3)).completions_per_s == 0.0
