"""What a node starts and drains, as a table."""

import random

import pytest

from millstream.broker.records import Planned
from millstream.replicas.reconcile import Actions, Running, reconcile

TAG = "app.Model"


def replica(name: str, version: str = "v1", *, tag: str = TAG, ready: bool = True, draining: bool = False, ongoing: int = 0) -> Running:  # fmt: skip
    return Running(name, tag, version, ready, draining, ongoing)


@pytest.mark.parametrize(
    ("wanted", "running", "start", "drain"),
    [
        pytest.param(2, [], 2, [], id="nothing runs: all are started"),
        pytest.param(2, [replica("a")], 1, [], id="one is missing"),
        pytest.param(1, [replica("a", ready=False)], 0, [], id="one that starts counts"),
        pytest.param(1, [replica("a", draining=True)], 1, [], id="one that drains does not"),
        pytest.param(2, [replica("a"), replica("b")], 0, [], id="as wanted"),
        pytest.param(0, [replica("a"), replica("b")], 0, ["a", "b"], id="none is wanted"),
        pytest.param(1, [replica("a", ongoing=3), replica("b", ongoing=1)], 0, ["b"], id="the least busy leaves"),
        pytest.param(1, [replica("a"), replica("b", ready=False)], 0, ["b"], id="one not ready leaves before an idle one"),
        pytest.param(1, [replica("a"), replica("b")], 0, ["a"], id="by name where nothing else tells"),
        pytest.param(1, [replica("a"), replica("b", draining=True)], 0, [], id="what drains is not drained again"),
    ],
)  # fmt: skip
def test_number_of_replicas(wanted: int, running: list[Running], start: int, drain: list[str]) -> None:
    actions = reconcile({TAG: Planned(wanted, "v1")}, running)

    assert actions == Actions({(TAG, "v1"): start} if start else {}, drain)


OLD = [replica("old1", "v0", ongoing=2), replica("old2", "v0")]


@pytest.mark.parametrize(
    ("wanted", "running", "start", "drain"),
    [
        pytest.param(2, OLD, 2, [], id="all new ones start first"),
        pytest.param(2, [*OLD, replica("a", ready=False), replica("b", ready=False)], 0, [], id="and get ready"),
        pytest.param(2, [*OLD, replica("a"), replica("b", ready=False)], 0, ["old2"], id="one ready: one old leaves"),
        pytest.param(2, [*OLD, replica("a"), replica("b")], 0, ["old2", "old1"], id="all ready: all old leave"),
        pytest.param(1, OLD, 1, ["old2"], id="fewer are wanted: no more old ones stay than that"),
        pytest.param(0, OLD, 0, ["old2", "old1"], id="none is wanted"),
        pytest.param(3, OLD, 3, [], id="more are wanted"),
    ],
)  # fmt: skip
def test_update_to_a_new_version(wanted: int, running: list[Running], start: int, drain: list[str]) -> None:
    actions = reconcile({TAG: Planned(wanted, "v1")}, running)

    assert actions == Actions({(TAG, "v1"): start} if start else {}, drain)


# new configs of the same version


def at(name: str, heading: str, *, updating: bool = False, ready: bool = True, ongoing: int = 0, spent: bool = False) -> Running:  # fmt: skip
    return Running(name, TAG, "v1", ready, False, ongoing, heading, updating, spent)


TEN = [at(f"r{n}", "c1", ongoing=9 - n) for n in range(10)]


@pytest.mark.parametrize(
    ("wanted", "running", "update"),
    [
        pytest.param(1, [at("a", "c2")], [], id="it knows"),
        pytest.param(1, [at("a", "c1")], ["a"], id="it does not"),
        pytest.param(3, [at(n, "c1") for n in "abc"], ["a"], id="one at a time"),
        pytest.param(10, TEN, ["r9", "r8"], id="of many a fifth, the least busy first"),
        pytest.param(2, [at("a", "c2", updating=True), at("b", "c1")], [], id="while one is at it the others go on"),
        pytest.param(2, [at("a", "c1", updating=True), at("b", "c1")], ["a"], id="one that is at the one before is told again"),
        pytest.param(2, [at("a", "c1")], [], id="nobody pauses while one is missing"),
        pytest.param(2, [at("a", "c1"), at("b", "c2", ready=False)], [], id="or is not ready"),
        pytest.param(1, [at("a", "c1", ready=False)], [], id="one that starts is told later"),
        pytest.param(1, [at("a", "c1"), at("b", "c1", ongoing=1)], ["b"], id="one that is drained is not told"),
        pytest.param(1, [at("a", "c1", spent=True)], [], id="one that is spent is not told"),
    ],
)  # fmt: skip
def test_update_to_a_new_config(wanted: int, running: list[Running], update: list[str]) -> None:
    assert reconcile({TAG: Planned(wanted, "v1", "c2")}, running).update == update


def test_spent_replica_is_replaced_as_one_of_another_version() -> None:
    plan = {TAG: Planned(1, "v1", "c2")}
    spent = at("a", "c1", spent=True)

    assert reconcile(plan, [spent]) == Actions({(TAG, "v1"): 1}, [])
    assert reconcile(plan, [spent, at("b", "c2", ready=False)]) == Actions()
    assert reconcile(plan, [spent, at("b", "c2")]) == Actions({}, ["a"])


@pytest.mark.parametrize("seed", range(10))
def test_update_of_the_config_reaches_all_and_pauses_a_fifth_at_most(seed: int) -> None:
    rng = random.Random(seed)
    wanted = rng.randint(1, 20)
    running = {f"r{n}": at(f"r{n}", "c1") for n in range(wanted)}
    for _ in range(200):
        for name in reconcile({TAG: Planned(wanted, "v1", "c2")}, running.values()).update:
            running[name] = at(name, "c2", updating=True)
        under_way = [r.replica for r in running.values() if r.is_updating]
        assert len(under_way) <= max(1, wanted // 5)
        if not under_way:
            break
        chosen = rng.choice(under_way)
        running[chosen] = at(chosen, "c2")

    assert {r.heading for r in running.values()} == {"c2"}


def test_what_is_in_no_plan_drains() -> None:
    assert reconcile({}, [replica("a"), replica("b", ready=False)]) == Actions({}, ["b", "a"])


def test_deployments_do_not_mix() -> None:
    running = [replica("a"), replica("b", tag="app.Other"), replica("c", tag="app.Other")]

    actions = reconcile({TAG: Planned(2, "v1"), "app.Other": Planned(1, "v1")}, running)

    assert actions == Actions({(TAG, "v1"): 1}, ["b"])


@pytest.mark.parametrize("seed", range(20))
def test_update_ends_as_planned_and_never_serves_with_fewer_than_wanted(seed: int) -> None:
    rng = random.Random(seed)
    wanted = rng.randint(1, 5)
    running = {f"old{n}": replica(f"old{n}", "v0") for n in range(wanted)}
    for step in range(200):
        actions = reconcile({TAG: Planned(wanted, "v1")}, running.values())
        if actions == Actions() and all(r.version == "v1" and r.is_ready for r in running.values()):
            break
        for name in actions.drain:
            del running[name]
        for n in range(actions.start.get((TAG, "v1"), 0)):
            running[f"new{step}-{n}"] = replica(f"new{step}-{n}", ready=False)
        if starting := [r for r in running.values() if not r.is_ready]:
            chosen = rng.choice(starting)
            running[chosen.replica] = replica(chosen.replica)

        assert sum(r.is_ready for r in running.values()) >= wanted

    assert len(running) == wanted
