"""Key names: one hash tag per deployment, no two keys alike, every one documented, and ref ids that lead to them."""

import inspect
import re
from functools import cached_property
from typing import Any

import pytest

from millstream.broker.keys import (
    LANES,
    PUT_TAGS,
    DeploymentKeys,
    Keys,
    check_name,
    deployment_tag,
    put_tag,
    split_ref,
)
from tests.helpers import new_ref

ALL = Keys("ms")
MODEL = ALL.deployment("app.Model")
SLOT = "{ms:app.Model}:"


def described(cls: type) -> dict[str, Any]:
    """The keys and channels of a class, by the attribute that makes them."""
    members = {name: member for name, member in vars(cls).items() if not name.startswith("_")}
    return {
        name: member
        for name, member in members.items()
        if (
            isinstance(member, cached_property)
            and not name.endswith("prefix")
            and name not in ("lanes", "owned", "of_submit", "of_finish")
        )
        or (inspect.isfunction(member) and name != "deployment")
    }


def spelled(keys: Any) -> list[str]:
    """Each key of `keys`, with arguments where it needs some."""
    values = []
    for name in described(type(keys)):
        value = getattr(keys, name)
        values.append(value(*"x" * len(inspect.signature(value).parameters)) if callable(value) else value)
    return values


def test_all_keys_of_a_deployment_share_its_hash_tag() -> None:
    assert [key for key in spelled(MODEL) if not key.startswith(SLOT)] == []


def test_keys_that_share_a_script_share_a_slot() -> None:
    assert ALL.leader.split("}")[0] == ALL.fence.split("}")[0] == "{ms:leader"


def test_no_two_keys_are_alike() -> None:
    keys = [*spelled(ALL), *spelled(MODEL), *spelled(ALL.deployment("app.Other")), *spelled(Keys("ms2"))]

    assert len(keys) == len(set(keys))


def test_lanes_come_in_the_order_in_which_replicas_take_from_them() -> None:
    assert MODEL.lanes == tuple(f"{SLOT}{lane}" for lane in ("returned", "high", "normal", "low"))
    assert len(LANES) == 4


def test_prefixes_are_those_of_the_keys_that_scripts_put_together() -> None:
    assert MODEL.supplied("x") == MODEL.supplied_prefix + "x"
    assert MODEL.result("x") == MODEL.result_prefix + "x"
    assert MODEL.lease("x") == MODEL.lease_prefix + "x"
    assert MODEL.reply("x") == MODEL.reply_prefix + "x"
    assert MODEL.orders("x") == MODEL.orders_prefix + "x"
    assert MODEL.payload("x") == MODEL.payload_prefix + "x"
    assert MODEL.value("x", "1-1") == MODEL.value_prefix + "x:1-1"
    assert MODEL.lane("high") == MODEL.prefix + "high"


def test_deployment_owns_what_has_no_ttl_and_not_its_results() -> None:
    assert {MODEL.config, MODEL.open, MODEL.dead, MODEL.deadlines, MODEL.holds, *MODEL.lanes} <= set(MODEL.owned)
    expiring = (MODEL.result_prefix, MODEL.lease_prefix, MODEL.value_prefix, MODEL.items(""))
    assert not any(key.startswith(expiring) for key in MODEL.owned)


@pytest.mark.parametrize("cls", [Keys, DeploymentKeys])
def test_every_key_is_documented_with_its_type(cls: type) -> None:
    kinds = ("string", "hash", "stream", "list", "sorted set", "channel", "sharded channel")

    undocumented = [
        name
        for name, member in described(cls).items()
        if not re.match(rf"({'|'.join(kinds)})\b", inspect.getdoc(member) or getattr(member, "__doc__", "") or "")
    ]

    assert undocumented == []


# names


@pytest.mark.parametrize("name", ["a", "Model", "my_model", "my-model", "_x", "9lives"])
def test_name_of_letters_digits_dashes_and_underscores_is_allowed(name: str) -> None:
    assert check_name("deployment", name) == name


@pytest.mark.parametrize("name", ["", "-x", "a.b", "a:b", "a~b", "{a}", "a b", "a\n", "ä", None, 7])
def test_name_that_would_break_a_key_is_refused_by_name(name: Any) -> None:
    with pytest.raises(ValueError, match="deployment name"):
        check_name("deployment", name)


# refs


def test_ref_id_leads_back_to_tag_and_key() -> None:
    ref = new_ref()

    assert split_ref(f"{deployment_tag('app', 'Model')}~{ref}") == ("app.Model", ref)


@pytest.mark.parametrize(
    "ref_id", ["", "app.Model", f"app.Model~{'x' * 21}", f"app.Model~{'x' * 23}", f"app~{'x' * 22}"]
)
def test_what_is_no_ref_id_is_refused(ref_id: str) -> None:
    with pytest.raises(ValueError, match="is not a ref id"):
        split_ref(ref_id)


def test_put_tags_are_a_fixed_number_and_read_as_tags() -> None:
    tags = {put_tag() for _ in range(5000)}

    assert len(tags) == PUT_TAGS
    assert {split_ref(f"{tag}~{'x' * 22}")[0] for tag in tags} == tags
