"""The judge of chaos: each kind of broken promise is seen, and what has a cause is none."""

import pytest

from chaos.judge import Fault, Stored, Verdict, judge
from chaos.ledger import Line
from chaos.plan import Harm

REF = "default.Work~0123456789abcdef000001"


def line(event: str, at_s: float, who: str = "c0-1", what: object = "-", more: object = "-") -> Line:
    return Line(event, at_s, who, str(what), str(more))


def submit(at_s: float = 1.0, kind: str = "slow", client: str = "c0/0") -> Line:
    return line("submit", at_s, what=client, more=kind)


def start(at_s: float, pid: int, token: str) -> Line:
    return line("start", at_s, what=pid, more=token)


def end(at_s: float, what: str = "ok", token: str = "-") -> Line:
    return line("end", at_s, what=what, more=token)


def findings(verdict: Verdict) -> dict[str, int]:
    found = {
        "lost": verdict.lost, "twice": verdict.accepted_twice, "unexplained": verdict.unexplained, "hung": verdict.hung,
        "left": verdict.left_in_server, "near": verdict.near_a_loss,
    }  # fmt: skip
    return {name: len(texts) for name, texts in found.items() if texts}


def test_a_request_that_ends_once_is_good() -> None:
    lines = [submit(), line("ref", 1.1, what=REF), start(1.2, 7, "r.1"), end(2.0, token="r.1")]

    verdict = judge(lines, [], {REF: Stored("succeeded", "r.1")})

    assert findings(verdict) == {} and verdict.is_good
    assert (verdict.requests, verdict.attempts, verdict.extra_attempts) == (1, 1, 0)


def test_an_error_is_a_loss() -> None:
    assert findings(judge([submit(), end(2.0, "RefNotFoundError:gone")], [], {})) == {"lost": 1}


def test_a_cancel_that_nobody_asked_for_is_a_loss() -> None:
    assert findings(judge([submit(), end(2.0, "cancelled")], [], {})) == {"lost": 1}
    assert findings(judge([submit(kind="cancel"), end(2.0, "cancelled")], [], {})) == {}


def test_a_result_that_the_server_does_not_have_is_a_loss() -> None:
    assert findings(judge([submit(), line("ref", 1.1, what=REF), end(2.0, token="r.1")], [], {})) == {"lost": 1}


def test_a_request_without_an_end_hangs() -> None:
    assert findings(judge([submit()], [], {})) == {"hung": 1}


def test_what_a_killed_client_left_hangs_only_if_it_can_be_found() -> None:
    begin, kill = line("begin", 0.5, "c0/0", 99), Fault(1.5, 1.5, Harm.KILL_CLIENT, (99,))
    ref = line("ref", 1.1, what=REF)

    assert findings(judge([begin, submit()], [kill], {})) == {}
    assert findings(judge([begin, submit(), ref], [kill], {})) == {"hung": 1}
    assert findings(judge([begin, submit(kind="keyed")], [kill], {})) == {"hung": 1}


def test_two_readers_with_two_values_are_two_results() -> None:
    lines = [submit(), line("ref", 1.1, what=REF), end(2.0, token="r.1")]

    assert findings(judge(lines, [], {REF: Stored("succeeded", "r.2")})) == {"twice": 1}


def test_two_entries_that_the_server_took_are_two_results() -> None:
    lines = [submit(), end(2.0), line("accepted", 1.5, "abc", "normal/1-1"), line("accepted", 1.6, "abc", "normal/1-1")]
    assert findings(judge(lines, [], {})) == {}

    lines.append(line("accepted", 1.7, "abc", "returned/2-1"))
    assert findings(judge(lines, [], {})) == {"twice": 1}


def test_a_second_attempt_without_a_cause_is_unexplained() -> None:
    lines = [submit(), start(1.2, 7, "r.1"), start(1.5, 8, "q.1"), end(2.0)]

    assert findings(judge(lines, [], {})) == {"unexplained": 1}
    assert findings(judge(lines, [Fault(1.4, 1.4, Harm.KILL_REPLICA, (9,))], {})) == {"unexplained": 1}
    assert findings(judge(lines, [Fault(1.6, 1.6, Harm.KILL_REPLICA, (7,))], {})) == {"unexplained": 1}
    assert findings(judge(lines, [Fault(1.1, 1.1, Harm.KILL_REPLICA, (7,))], {})) == {"unexplained": 1}


@pytest.mark.parametrize("harm", [Harm.PAUSE_REPLICA, Harm.KILL_LAUNCHER, Harm.PAUSE_LAUNCHER, Harm.CUT, Harm.SERVER])
def test_what_ends_no_replica_explains_no_attempt(harm: Harm) -> None:
    lines = [submit(), start(1.2, 7, "r.1"), start(1.5, 8, "q.1"), end(2.0)]

    assert findings(judge(lines, [Fault(1.3, 1.4, harm, (7,))], {})) == {"unexplained": 1}


@pytest.mark.parametrize("harm", [Harm.KILL_REPLICA, Harm.VANISH_HOST, Harm.STOP_REPLICA])
def test_the_end_of_its_replica_explains_the_next_attempt(harm: Harm) -> None:
    lines = [submit(), start(1.2, 7, "r.1"), start(1.5, 8, "q.1"), end(2.0)]

    verdict = judge(lines, [Fault(1.3, 1.3, harm, (6, 7))], {})

    assert findings(verdict) == {} and verdict.extra_attempts == 1


def test_one_death_explains_one_attempt() -> None:
    lines = [submit(), start(1.2, 7, "r.1"), start(1.5, 8, "q.1"), start(1.6, 9, "p.1"), end(2.0)]

    assert findings(judge(lines, [Fault(1.3, 1.3, Harm.KILL_REPLICA, (7,))], {})) == {"unexplained": 1}


def test_an_attempt_that_raised_explains_the_next() -> None:
    lines = [submit(), start(1.2, 7, "r.1"), line("raised", 1.3, what=7, more="r.1"), start(1.5, 7, "r.2"), end(2.0)]

    assert findings(judge(lines, [], {})) == {}


def test_what_is_left_in_the_server_is_reported() -> None:
    assert findings(judge([submit(), end(2.0)], [], {}, ["default.Work: 1 in 'open'"])) == {"left": 1}


def test_what_falls_within_two_seconds_before_a_loss_of_data_stands_apart() -> None:
    loss = Fault(3.0, 3.5, Harm.SERVER, loses_data=True)
    again = [submit(), start(1.2, 7, "r.1"), start(4.0, 8, "q.1"), end(4.5)]
    error = [submit(), end(4.0, "RefNotFoundError:gone")]
    long_before = [submit(-9.0), end(0.5, "RefNotFoundError:gone")]

    assert findings(judge(again, [loss], {})) == {"near": 1}
    assert findings(judge(error, [loss], {})) == {"near": 1}
    assert findings(judge(long_before, [loss], {})) == {"lost": 1}
    assert findings(judge(again, [Fault(3.0, 3.5, Harm.SERVER)], {})) == {"unexplained": 1}


def test_takeover_is_timed_of_what_ran_on_the_victim() -> None:
    lines = [submit(), start(1.2, 7, "r.1"), start(1.5, 8, "q.1"), end(2.0)]
    ended_before = [
        submit(), start(1.2, 7, "r.1"), line("done", 1.25, what=7, more="r.1"), start(1.5, 8, "q.1"), end(2.0),
    ]  # fmt: skip
    kill = Fault(1.3, 1.3, Harm.KILL_REPLICA, (7,))

    assert judge(lines, [kill], {}).takeovers == {"kill-replica": [pytest.approx(0.2)]}
    assert judge(ended_before, [kill], {}).takeovers == {}


def test_takeover_from_what_only_stopped_counts_from_its_health_timeout() -> None:
    lines = [submit(), start(1.2, 7, "r.1"), start(6.0, 8, "q.1"), end(7.0)]

    verdict = judge(lines, [Fault(1.3, 9.0, Harm.STOP_REPLICA, (7,))], {}, health_timeout_s=4.0)

    assert verdict.takeovers == {"stop-replica": [pytest.approx(0.7)]}


def test_takeover_during_another_fault_stands_apart() -> None:
    lines = [submit(), start(1.2, 7, "r.1"), start(1.5, 8, "q.1"), end(2.0)]
    kill = Fault(1.3, 1.3, Harm.KILL_REPLICA, (7,))

    verdict = judge(lines, [kill, Fault(1.2, 2.0, Harm.STALL)], {})

    assert list(verdict.takeovers) == ["kill-replica, with another fault"]
