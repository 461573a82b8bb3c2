"""Signed records: good where they were put and as they were written, and nowhere else."""

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.broker.records import AppRecord, NodeRecord, Planned, ReplicaRecord
from millstream.broker.signed import Signer
from millstream.config import Settings
from millstream.errors import SignatureError
from tests.docs import pages
from tests.security.hostile import GARBAGE, damaged, fuzzed

SIGNER = Signer(Settings("redis://nowhere.invalid", secret_key=b"a secret"))
RECORDS: list[tuple[Any, tuple[str, ...]]] = [
    (AppRecord("app", "v1", "Model", ["Model"], 5, {"Old": "v0"}), ("app",)),
    (NodeRecord("here", "höst", 1, 2), ("here",)),
    (Planned(2, "v1", "c1"), ("here", "app.Model")),
    (ReplicaRecord("r-1", "here", 1, "v1", "RUNNING", 2, [7, 8], "c1"), ("app.Model", "r-1")),
]
of_each_kind = pytest.mark.parametrize(
    ("record", "place"), RECORDS, ids=[type(record).__name__ for record, _ in RECORDS]
)


@of_each_kind
def test_record_comes_back_as_it_was_written(record: Any, place: tuple[str, ...]) -> None:
    stored = SIGNER.write(record, *place)

    assert "\n" not in stored
    assert SIGNER.read(type(record), stored.encode(), *place) == record


def test_text_is_what_the_page_says() -> None:
    stored = SIGNER.sign("plan", '{"replicas": 2}', "n-1", "default.Review")

    parts = b"".join(len(part).to_bytes(4, "big") + part for part in (b"n-1", b"default.Review"))
    signed = b"ms\0" + parts + b'{"replicas": 2}'
    digits = hashlib.blake2b(signed, key=b"a secret", digest_size=16, person=b"ms plan").hexdigest()
    assert stored == f'{digits} {{"replicas": 2}}'
    assert f"    {stored}\n" in (pages.ROOT / "docs" / "keyspace.md").read_text()


@fuzzed(150)
@given(st.data())
def test_changed_record_is_refused(data: st.DataObject) -> None:
    record, place = data.draw(st.sampled_from(RECORDS))
    stored = data.draw(st.one_of(damaged(SIGNER.write(record, *place).encode()), GARBAGE))

    with pytest.raises(SignatureError, match="does not bear this installation's signature"):
        SIGNER.read(type(record), stored, *place)


@of_each_kind
def test_record_is_good_in_its_own_place_only(record: Any, place: tuple[str, ...]) -> None:
    stored = SIGNER.write(record, *place).encode()
    others = [
        [*place[:i], other, *place[i + 1 :]] for i in range(len(place)) for other in ("", "elsewhere", place[i] + "x")
    ]

    for elsewhere in [*others, place[1:], (*place, ""), ("".join(place),)]:
        if tuple(elsewhere) != place:
            with pytest.raises(SignatureError):
                SIGNER.read(type(record), stored, *elsewhere)


def test_record_of_another_kind_installation_or_secret_is_refused() -> None:
    stored = SIGNER.sign("plan", "{}", "a", "b").encode()
    others = [Settings("redis://x", "other", b"a secret"), Settings("redis://x", secret_key=b"another secret")]

    assert SIGNER.verified("plan", stored, "a", "b") == b"{}"
    with pytest.raises(SignatureError):
        SIGNER.verified("replica", stored, "a", "b")
    for settings in others:
        with pytest.raises(SignatureError):
            Signer(settings).verified("plan", stored, "a", "b")
