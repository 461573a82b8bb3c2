"""Stored results, read back: values, user errors, dead letters and the notices that announce them."""

import json
import pickle
from typing import Any

import pytest

from millstream.broker import outcomes, pickling, remote_errors
from millstream.broker.codec import Codec
from millstream.errors import GetTimeoutError, RefNotFoundError, ReplicaDiedError, SignatureError, TaskError

CODEC = Codec(b"a secret", "ms", "app.Model")
REF = b"r" * 22
HISTORY = [
    {"replica": "r-1", "cause": "killed by signal 9", "attempt": 1, "at_ms": 1},
    {"replica": "r-2", "cause": "its lease expired", "attempt": 2, "at_ms": 2},
]
DEAD = b"dead returned 1-1\n" + json.dumps(HISTORY).encode()


def succeeded(value: Any) -> bytes:
    return b"succeeded normal 1-1\n" + CODEC.seal("value", REF, pickling.dump(value, what="value"))


def failed(error: BaseException) -> bytes:
    return b"failed normal 1-1\n" + CODEC.seal("error", REF, remote_errors.capture(error))


@pytest.mark.parametrize("value", [None, 7, b"\n\n", {"a": "line\n"}])
def test_value_is_returned(value: Any) -> None:
    assert outcomes.open_stored(CODEC, REF, succeeded(value)) == value


def test_error_of_the_user_is_raised() -> None:
    with pytest.raises(ValueError, match="bad input") as caught:
        outcomes.open_stored(CODEC, REF, failed(ValueError("bad input")))

    assert isinstance(caught.value, TaskError)
    assert caught.value.ref_id == "app.Model~" + REF.decode()


def test_dead_letter_is_raised_with_every_attempt() -> None:
    with pytest.raises(ReplicaDiedError, match=r"replica r-2 when it died \(its lease expired\)") as caught:
        outcomes.open_stored(CODEC, REF, DEAD)

    assert caught.value.ref_id == "app.Model~" + REF.decode()
    assert caught.value.attempts == HISTORY
    assert "max_attempts=2" in str(caught.value)


@pytest.mark.parametrize("stored", [b"unknown", b"", b"open", b"exploded normal 1-1\nbody"])
def test_what_is_no_outcome_is_not_found(stored: bytes) -> None:
    with pytest.raises(RefNotFoundError, match=r"app\.Model~rrr"):
        outcomes.open_stored(CODEC, REF, stored)


def test_value_and_error_cannot_be_taken_for_each_other() -> None:
    value_as_error = succeeded(7).replace(b"succeeded", b"failed", 1)
    error_as_value = failed(ValueError()).replace(b"failed", b"succeeded", 1)

    for forged in (value_as_error, error_as_value):
        with pytest.raises(SignatureError):
            outcomes.open_stored(CODEC, REF, forged)


def test_notices_are_told_from_outcomes() -> None:
    announced, matched = b"succeeded normal 1-1\n", b"running normal 1-1\n"

    assert [stored.endswith(b"\n") for stored in (announced, matched)] == [True, True]
    assert [stored.endswith(b"\n") for stored in (succeeded("\n"), failed(ValueError("\n")), DEAD)] == [False] * 3
    assert [outcomes.is_running(stored) for stored in (matched, announced, DEAD)] == [True, False, False]


def test_error_for_a_dependant_is_the_original() -> None:
    body = outcomes.error_body(CODEC, REF, failed(ValueError("bad input")))

    error = remote_errors.rebuild(pickle.loads(body), "app.Other~x")
    assert isinstance(error, ValueError) and "bad input" in str(error)


def test_dead_letter_for_a_dependant_is_the_death_upstream() -> None:
    error = remote_errors.rebuild(pickle.loads(outcomes.error_body(CODEC, REF, DEAD)), "app.Other~x")

    assert isinstance(error, ReplicaDiedError)
    assert error.ref_id == "app.Model~" + REF.decode()


def test_error_of_a_dependant_is_not_taken_over_unverified() -> None:
    with pytest.raises(SignatureError):
        outcomes.error_body(CODEC, b"x" * 22, failed(ValueError()))


def test_copy_of_our_error_is_another_object_of_the_same_content() -> None:
    error = GetTimeoutError("too late", ref_id="x")

    again = outcomes.same_kind(error)

    assert again is not error
    assert (type(again), str(again), vars(again)) == (GetTimeoutError, "too late", {"ref_id": "x"})
