"""How a launcher remembers its failures: the clock is a number here."""

from millstream.replicas.starts import LONGEST_DELAY_S, START_FAILURES, Release, Starts

MODEL = Release("app.Model", "v1", "c1")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_starts_under_way_are_counted_and_forgotten() -> None:
    starts = Starts()

    starts.begin("app.Model", "v1")
    starts.begin("app.Model", "v1")
    starts.end("app.Model", "v1")

    assert starts.under_way == {("app.Model", "v1"): 1}
    starts.end("app.Model", "v1")
    assert starts.under_way == {}


def test_failures_in_a_row_are_too_many_at_last() -> None:
    starts = Starts()

    assert [starts.failed(MODEL) for _ in range(START_FAILURES)] == [False] * (START_FAILURES - 1) + [True]


def test_success_in_between_begins_the_count_anew() -> None:
    starts = Starts()
    for _ in range(START_FAILURES - 1):
        starts.failed(MODEL)

    starts.succeeded(MODEL)

    assert not starts.failed(MODEL)


def test_what_was_given_up_may_start_again_with_another_config_or_code() -> None:
    starts = Starts()

    starts.give_up(MODEL)

    assert not starts.may_begin(MODEL)
    assert starts.may_begin(MODEL._replace(revision="c2")) and starts.may_begin(MODEL._replace(version="v2"))
    assert starts.has_given_up("v1") and not starts.has_given_up("v2")


def test_quick_deaths_delay_the_next_start_more_and_more_up_to_a_limit() -> None:
    clock = Clock()
    starts = Starts(clock)
    delays = []
    for _ in range(12):
        starts.lived("app.Model", 0.1)
        assert not starts.may_begin(MODEL)
        delays.append(round(starts._not_before["app.Model"] - clock.now_s, 3))
        clock.now_s = starts._not_before["app.Model"]
        assert starts.may_begin(MODEL)

    assert delays == sorted(delays)
    assert delays[0] < 0.2 and delays[-1] == LONGEST_DELAY_S
    assert starts.may_begin(Release("app.Other", "v1", "c1"))


def test_death_after_a_long_life_delays_nothing() -> None:
    starts = Starts(Clock())
    for _ in range(5):
        starts.lived("app.Model", 0.1)

    starts.lived("app.Model", 3600.0)
    starts.lived("app.Model", 0.1)

    assert starts._not_before["app.Model"] <= 100.0 + 0.1
