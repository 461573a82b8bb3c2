"""The check that runs after every test is itself tested: on readings made by hand."""

import pytest

from millstream.broker.keys import DeploymentKeys, Keys
from tests.leaks import NO_TTL, Requests, Snapshot, find_leaks, find_lost

KEYS = Keys("ms")
MODEL = KEYS.deployment("app.Model")
REF = "r" * 22


def snapshot(*names: str, requests: Requests | None = None, nodes: tuple[str, ...] = ()) -> Snapshot:
    """A reading of keys without TTL."""
    return Snapshot(
        ttls_ms=dict.fromkeys(names, NO_TTL),
        requests={MODEL: requests or Requests()},
        nodes={"ms": frozenset(nodes)},
    )


@pytest.mark.parametrize("key", [KEYS.fence, KEYS.secret_check, KEYS.changes, KEYS.apps, KEYS.nodes])
def test_permanent_key_is_no_leak(key: str) -> None:
    assert find_leaks(snapshot(key)) == []


def test_key_with_ttl_is_no_leak() -> None:
    reading = Snapshot(ttls_ms={MODEL.result(REF): 1000, MODEL.lease("r-1"): 100, "whatever": 1})
    assert find_leaks(reading) == []


def test_result_without_ttl_is_a_leak() -> None:
    assert find_leaks(snapshot(MODEL.config, MODEL.result(REF))) == [MODEL.result(REF)]


def test_stranger_is_a_leak() -> None:
    assert find_leaks(snapshot(KEYS.apps, "celery")) == ["celery"]


def test_keys_of_a_deployment_are_no_leak_while_it_exists() -> None:
    assert find_leaks(snapshot(*MODEL.owned)) == []


def test_keys_of_a_deleted_deployment_are_leaks() -> None:
    left = [key for key in MODEL.owned if key != MODEL.config]
    assert find_leaks(snapshot(*left)) == sorted(left)


def test_keys_of_another_deployment_are_leaks() -> None:
    other = DeploymentKeys("ms", "app.Other")
    assert find_leaks(snapshot(MODEL.config, other.open)) == [other.open]


def test_supplied_values_are_no_leak_while_its_request_is_open() -> None:
    supplied = MODEL.supplied(REF)
    assert find_leaks(snapshot(MODEL.config, supplied, requests=Requests(open={REF: "parked"}))) == []
    assert find_leaks(snapshot(MODEL.config, supplied)) == [supplied]


def test_large_arguments_are_no_leak_while_their_request_is_open() -> None:
    payload = MODEL.payload(REF)
    assert find_leaks(snapshot(MODEL.config, payload, requests=Requests(open={REF: "normal 1-1"}))) == []
    assert find_leaks(snapshot(MODEL.config, payload)) == [payload]


@pytest.mark.parametrize("key", [MODEL.value(REF, "1-1"), MODEL.items(REF)])
def test_large_value_and_items_without_ttl_are_leaks_even_of_an_open_request(key: str) -> None:
    assert find_leaks(snapshot(MODEL.config, key, requests=Requests(open={REF: "normal 1-1"}))) == [key]


def test_plan_of_a_node_is_no_leak_while_the_node_is_listed() -> None:
    plan = KEYS.node_plan("n-1")
    assert find_leaks(snapshot(plan, nodes=("n-1",))) == []
    assert find_leaks(snapshot(plan, nodes=("n-2",))) == [plan]


@pytest.mark.parametrize(
    "requests",
    [
        Requests(),
        Requests(open={REF: "normal 1-1"}, entries={"normal 1-1": REF}, noted=frozenset({REF})),
        Requests(open={REF: "parked"}, parked=frozenset({REF}), held=frozenset({REF})),
        Requests(open={REF: "delayed"}, delayed=frozenset({REF}), held=frozenset({REF})),
        Requests(open={REF: "low 1-1"}, entries={"low 1-1": REF}, timed=frozenset({REF}), holding=frozenset({REF})),
        Requests(ended=frozenset({REF})),
    ],
)
def test_request_in_one_place_is_not_lost(requests: Requests) -> None:
    assert find_lost(snapshot(requests=requests)) == []


@pytest.mark.parametrize(
    ("requests", "complaint"),
    [
        (Requests(open={REF: "normal 1-1"}), "nothing is there"),
        (Requests(open={REF: "normal 1-1"}, entries={"high 1-1": REF}), "nothing is there"),
        (Requests(open={REF: "parked"}, parked=frozenset({REF})), "nothing is there"),
        (Requests(open={REF: "parked"}, held=frozenset({REF})), "nothing is there"),
        (Requests(open={REF: "delayed"}, held=frozenset({REF})), "nothing is there"),
        (Requests(entries={"normal 1-1": REF}), "open at None"),
        (Requests(entries={"normal 1-1": REF}, ended=frozenset({REF})), "open at None"),
        (Requests(open={REF: "low 1-1"}, entries={"low 1-1": REF, "low 1-2": REF}), "entry 'low 1-2'"),
        (Requests(open={REF: "low 1-1"}, entries={"low 1-1": REF}, ended=frozenset({REF})), "has a result"),
        (Requests(parked=frozenset({REF})), "in 'parked' and not open"),
        (Requests(delayed=frozenset({REF})), "in 'delayed' and not open"),
        (Requests(held=frozenset({REF})), "in 'held' and not open"),
        (Requests(noted=frozenset({REF})), "in 'noted' and not open"),
        (Requests(timed=frozenset({REF})), "in 'timed' and not open"),
        (Requests(holding=frozenset({REF})), "in 'holding' and not open"),
    ],
)
def test_request_in_no_place_or_two_is_lost(requests: Requests, complaint: str) -> None:
    lost = find_lost(snapshot(requests=requests))
    assert complaint in " ".join(lost)
