"""Spreading replicas over nodes."""

import pytest

from millstream.autoscaler.placement import place


def test_growth_goes_to_the_least_loaded_node() -> None:
    assert place(3, ["a", "b"], {"a": 1}, {"a": 5, "b": 0}) == {"a": 1, "b": 2}


def test_shrinking_takes_from_the_most_loaded_node_that_has_some() -> None:
    assert place(1, ["a", "b", "c"], {"a": 1, "b": 1}, {"a": 2, "b": 1, "c": 9}) == {"a": 0, "b": 1, "c": 0}


def test_what_is_placed_stays_where_it_is() -> None:
    assert place(3, ["a", "b"], {"a": 3}, {"a": 3}) == {"a": 3, "b": 0}


def test_the_share_of_a_node_that_is_gone_is_placed_anew() -> None:
    assert place(4, ["a"], {"a": 2, "gone": 2}, {"a": 2}) == {"a": 4}


def test_without_nodes_nothing_is_placed() -> None:
    assert place(4, [], {"gone": 4}, {}) == {}


@pytest.mark.parametrize("target", [0, 1, 7])
def test_the_target_is_met_exactly(target: int) -> None:
    assert sum(place(target, ["a", "b", "c"], {"a": 2, "b": 2}, {"a": 2, "b": 2}).values()) == target
