"""How many requests may be taken ahead of those that run: decided by how quickly others ended."""

import pytest

from millstream.replicas.pace import AHEAD_S, MOST, MOST_PROMPT, PROVEN, STILL_S, Pace


def after(*durations_s: float) -> Pace:
    """Runs one after the other, all of them given to the threads at once."""
    pace, now = Pace(), 1.0
    pace.ended(now, now)
    for duration_s in durations_s:
        now += duration_s
        pace.ended(1.0, now)
    return pace


@pytest.mark.parametrize(
    ("duration_s", "expected"),
    [
        (0.0, MOST),
        (AHEAD_S / MOST / 2, MOST),
        (AHEAD_S / 3.5, 3),
        (AHEAD_S / 1.5, 1),
        (1.1 * AHEAD_S, 0),
        (10 * AHEAD_S, 0),
    ],
)
def test_as_many_as_end_within_the_time_and_no_more_than_the_most(duration_s: float, expected: int) -> None:
    assert after(*[duration_s] * PROVEN * 3).ahead == expected


def test_nothing_is_taken_ahead_before_a_number_of_runs_was_short() -> None:
    assert after(*[0.0001] * (PROVEN - 2)).ahead == 0
    assert after(*[0.0001] * (PROVEN - 1)).ahead == MOST


def test_after_one_long_run_it_begins_anew() -> None:
    assert after(*[0.0001] * PROVEN, 1.1 * AHEAD_S).ahead == 0
    assert after(*[0.0001] * PROVEN, 1.1 * AHEAD_S, *[0.0001] * PROVEN).ahead == MOST


def test_time_without_requests_is_no_long_run() -> None:
    pace = after(*[0.0001] * PROVEN)

    pace.ended(1000.0, 1000.0001)

    assert pace.ahead == MOST


def test_it_stands_still_when_nothing_has_ended_for_long_and_then_nothing_more_is_taken() -> None:
    pace = Pace()
    for _ in range(PROVEN):
        pace.ended(1.0, 1.0)

    assert not pace.stands_still(1.0 + STILL_S / 2)
    assert pace.ahead == MOST
    assert pace.stands_still(1.0 + STILL_S)
    assert pace.ahead == 0


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([(PROVEN - 1, 0.0001)], 0),
        ([(PROVEN, 0.0001)], MOST_PROMPT),
        ([(50, 50 * AHEAD_S / 100)], 100),
        ([(50, 0.0001), (50, 1.1 * AHEAD_S)], 0),
        ([(50, 0.0001), (50, 1.1 * AHEAD_S), (PROVEN, 0.0001)], MOST_PROMPT),
        ([(1, 0.0001)] * PROVEN, 50),
    ],
)
def test_of_those_that_end_together_as_many_as_end_within_the_time(
    batches: list[tuple[int, float]], expected: int
) -> None:
    pace = Pace(MOST_PROMPT)

    for count, took_s in batches:
        pace.ended_together(count, took_s)

    assert pace.ahead == pytest.approx(expected, abs=1)
