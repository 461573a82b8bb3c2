"""The plan of chaos: the same seed, the same requests and faults."""

from collections import Counter

from chaos.plan import FULL, FULL_S, LASTS_S, Harm, Kind, faults, mix, steps


def test_same_seed_gives_the_same_plan() -> None:
    assert list(steps(3, 1, 500)) == list(steps(3, 1, 500))
    assert faults(3, 60.0, mix(60.0)) == faults(3, 60.0, mix(60.0))


def test_another_seed_or_client_gives_another() -> None:
    plans = [list(steps(3, 1, 500)), list(steps(4, 1, 500)), list(steps(3, 2, 500))]

    assert all(plans.count(plan) == 1 for plan in plans)
    assert faults(3, 60.0, mix(60.0)) != faults(4, 60.0, mix(60.0))


def test_steps_number_their_requests_without_gaps_and_are_of_every_kind() -> None:
    plan = list(steps(1, 0, 2000))

    assert [step.number for step in plan[1:]] == [step.number + step.count for step in plan[:-1]]
    assert plan[-1].number + plan[-1].count >= 2000
    assert {step.kind for step in plan} == set(Kind)


def test_faults_come_in_order_with_load_before_and_after_them() -> None:
    planned = faults(1, 100.0, FULL)

    assert [fault.at_s for fault in planned] == sorted(fault.at_s for fault in planned)
    assert planned[0].at_s >= 5.0 and planned[-1].at_s <= 92.0
    assert Counter(fault.harm for fault in planned) == FULL


def test_every_kind_of_fault_is_in_every_run_and_a_full_one_kills_a_hundred_times() -> None:
    assert mix(10.0) == dict.fromkeys(Harm, 1)
    assert mix(FULL_S) == FULL
    assert sum(count for harm, count in FULL.items() if harm.startswith(("kill", "vanish"))) >= 96  # a host: several


def test_a_launcher_stands_still_for_longer_than_a_lease() -> None:
    assert LASTS_S[Harm.PAUSE_LAUNCHER][0] > 5.0
