"""Judging the ledger of the comparison with other queues: pure."""

from benchmarks.faults.ledger import judge, parse


def test_task_that_never_ended_is_lost_and_one_that_ended_twice_is_doubled() -> None:
    lines = parse("sent a 1 1\nsent b 1 1\nstart b 2 2\nend b 2 3\nstart b 3 6\nend b 3 7\n")

    verdict = judge(lines, fault_s=5.0)

    assert (verdict.accepted, verdict.lost, verdict.doubled) == (2, 1, 1)
    assert verdict.interrupted == 0
    assert verdict.all_done_s is None


def test_takeover_is_from_the_fault_to_the_next_start_of_what_it_interrupted() -> None:
    lines = parse("sent a 1 1\nsent b 1 1\nstart a 2 4\nstart b 2 4\nstart a 3 6\nend a 3 7\nstart b 3 8\nend b 3 9\n")

    verdict = judge(lines, fault_s=5.0)

    assert (verdict.interrupted, verdict.taken_over) == (2, 2)
    assert (verdict.takeover_median_s, verdict.takeover_max_s) == (2.0, 3.0)
    assert (verdict.lost, verdict.doubled, verdict.all_done_s) == (0, 0, 4.0)


def test_warm_up_and_what_was_refused_do_not_count() -> None:
    verdict = judge(parse("sent warm-0 1 1\nrefused a 1 1\n"), fault_s=5.0)

    assert (verdict.accepted, verdict.refused, verdict.lost) == (0, 1, 0)
