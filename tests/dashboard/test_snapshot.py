import json
from dataclasses import asdict
from typing import Any

import pytest

from millstream.broker.control_scripts import Backlog
from millstream.config import AutoscalingConfig, DeploymentConfig, Settings
from millstream.dashboard.rates import Rates
from millstream.dashboard.snapshot import Decision, Leader, Limits, Node, Problem, Snapshot, shape
from tests.dashboard.looks import INFO, NODE, make_look, make_replica, make_view

SETTINGS = Settings("redis://user:hush@db.example:6379/0", namespace="mill")


def shaped(*views: Any, rates: dict[str, Rates] | None = None, **changes: Any) -> Snapshot:
    return shape(make_look(*views, **changes), rates or {}, SETTINGS)


def test_healthy_installation_has_no_problems() -> None:
    assert shaped(make_view()).problems == []


def test_snapshot_is_plain_json() -> None:
    text = json.dumps(asdict(shaped(make_view())))

    assert json.loads(text)["deployments"][0]["tag"] == "shop.Model"


def test_neither_password_nor_user_config_is_shown() -> None:
    view = make_view(config=DeploymentConfig(user_config={"token": "hush"}))

    assert "hush" not in json.dumps(asdict(shaped(view)))


def test_valkey_is_called_by_its_own_version() -> None:
    server = shaped(info={**INFO, "redis_version": "7.2.4", "valkey_version": "9.1.2"}).server

    assert (server.kind, server.version) == ("Valkey", "9.1.2")


def test_redis_is_called_redis() -> None:
    server = shaped().server

    assert (server.kind, server.version, server.maxmemory_bytes) == ("Redis", "7.0.15", None)


def test_deployment_shows_its_backlog_rates_and_dead_letters() -> None:
    backlog = Backlog(waiting=7, in_flight=3, parked=1, delayed=2, oldest_waiting_s=1.5, arrivals=10)

    snapshot = shaped(make_view(backlog=backlog), rates={"shop.Model": Rates(12.3456, 11.0)}, dead={"shop.Model": 4})

    (deployment,) = snapshot.deployments
    assert (deployment.waiting, deployment.in_flight, deployment.parked, deployment.delayed) == (7, 3, 1, 2)
    assert (deployment.arrivals_per_s, deployment.completions_per_s) == (12.35, 11.0)
    assert (deployment.oldest_waiting_s, deployment.dead_letters) == (1.5, 4)


def test_totals_are_sums_of_what_is_known() -> None:
    views = [make_view("A", backlog=Backlog(waiting=2)), make_view("B", backlog=Backlog(waiting=3, in_flight=1))]

    totals = shaped(*views, rates={"shop.A": Rates(1.5, 0.5)}, dead={"shop.B": 2}).totals

    assert (totals.waiting, totals.in_flight, totals.dead_letters) == (5, 1, 2)
    assert (totals.arrivals_per_s, totals.completions_per_s) == (1.5, 0.5)


def test_totals_without_any_rate_are_unknown() -> None:
    assert shaped(make_view()).totals.arrivals_per_s is None


def test_running_counts_the_present_version_only() -> None:
    replicas = [make_replica("r-1"), make_replica("r-2", "STARTING"), make_replica("r-3", version="v0")]

    (deployment,) = shaped(make_view(replicas=replicas)).deployments

    assert deployment.running == 1
    assert [replica.is_current for replica in deployment.replicas] == [True, True, False]


def test_target_is_unknown_until_an_autoscaler_has_decided() -> None:
    (deployment,) = shaped(make_view(has_target=False, target=0)).deployments

    assert deployment.target is None


@pytest.mark.parametrize(
    ("override", "limits"),
    [
        (None, Limits(1, 8, "config")),
        ({"min_replicas": 2}, Limits(2, 8, "operator")),
        ({"min_replicas": 2, "max_replicas": 3}, Limits(2, 3, "operator")),
        ({"num_replicas": 5}, Limits(5, 5, "operator")),
    ],
)
def test_limits_are_the_config_s_unless_an_operator_set_others(override: dict[str, Any] | None, limits: Limits) -> None:
    config = DeploymentConfig(autoscaling=AutoscalingConfig(min_replicas=1, max_replicas=8))

    (deployment,) = shaped(make_view(config=config, override=override)).deployments

    assert deployment.limits == limits
    assert deployment.policy == "backlog"


def test_fixed_deployment_has_one_limit() -> None:
    (deployment,) = shaped(make_view(config=DeploymentConfig(num_replicas=4))).deployments

    assert (deployment.limits, deployment.policy) == (Limits(4, 4, "config"), "fixed")


def test_node_says_whether_it_lives_and_how_many_replicas_it_runs() -> None:
    snapshot = shaped(make_view(), alive=frozenset())

    assert snapshot.nodes == [Node("mill-1", "mill.example", 4711, 500, False, 1)]
    assert Problem("warning", "node mill-1 (mill.example) no longer renews its lease") in snapshot.problems


@pytest.mark.parametrize(("text", "leader"), [("a1b2 7", Leader("a1b2", 7)), (None, None), ("nonsense", None)])
def test_leader_is_read_from_its_lease(text: str | None, leader: Leader | None) -> None:
    assert shaped(leader=text).autoscaler == leader


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({"info": {**INFO, "maxmemory_policy": "allkeys-lru"}}, "error", "maxmemory-policy is allkeys-lru"),
        ({"info": {**INFO, "maxmemory": 1050}}, "error", "95% of maxmemory"),
        ({"info": {**INFO, "role": "slave"}}, "error", "this server is a slave"),
        ({"info": {**INFO, "aof_enabled": 0}}, "warning", "append-only file is off"),
        ({"nodes": [], "alive": frozenset()}, "error", "no launcher lives"),
        ({"leader": None}, "error", "no autoscaler leads"),
    ],
)
def test_problem_is_named_with_what_to_do(changes: dict[str, Any], level: str, words: str) -> None:
    (problem,) = shaped(make_view(replicas=[], target=0), **changes).problems

    assert problem.level == level
    assert words in problem.text


def test_missing_launcher_and_autoscaler_are_warnings_while_nothing_is_deployed() -> None:
    problems = shaped(nodes=[], alive=frozenset(), leader=None).problems

    assert [problem.level for problem in problems] == ["warning", "warning"]


def test_memory_below_the_mark_is_no_problem() -> None:
    assert shaped(make_view(), info={**INFO, "maxmemory": 2000}).problems == []


def test_deployment_that_cannot_start_is_an_error_above_the_warnings() -> None:
    view = make_view(failure="its constructor raised ValueError", traceback="Traceback ...")

    problems = shaped(view, info={**INFO, "aof_enabled": 0}).problems

    assert [problem.level for problem in problems] == ["error", "warning"]
    assert problems[0].text == "shop.Model cannot start: its constructor raised ValueError"


def test_old_request_is_a_warning_where_replicas_run() -> None:
    late = Backlog(waiting=1, oldest_waiting_s=20.0)

    (problem,) = shaped(make_view(backlog=late)).problems

    assert problem == Problem("warning", "shop.Model: a request has been waiting for 20 s")


def test_decision_parts_its_inputs_from_what_was_decided() -> None:
    record = {
        "at_ms": "1700000000000", "was": "1", "target": "3", "reason": "busy", "by": "a1b2",
        "waiting": "40", "service_time_s": "",
    }  # fmt: skip

    assert Decision.from_record(record) == Decision(1700000000000, 1, 3, "busy", "a1b2", {"waiting": "40"})


def test_first_decision_was_nothing_before() -> None:
    record = {"at_ms": "5", "was": "", "target": "0", "reason": "first deployment", "by": "a1b2"}

    assert Decision.from_record(record).was is None


def test_nodes_are_listed_even_without_deployments() -> None:
    assert [node.node for node in shaped().nodes] == [NODE.node]
