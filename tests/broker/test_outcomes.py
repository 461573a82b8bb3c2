"""Stored results, read back: values, user errors, dead letters and the notices that announce them."""

import json
import pickle
from typing import Any

import pytest

from millstream.broker import outcomes, pickling, remote_errors
from millstream.broker.codec import Codec, Kind
from millstream.errors import (
    BackPressureError,
    GetTimeoutError,
    MillstreamError,
    RefNotFoundError,
    ReplicaDiedError,
    RequestCancelledError,
    RequestTimeoutError,
    SignatureError,
    TaskError,
)

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
    assert "that was attempt 2, the last one it had" in str(caught.value)


CANCELLED = b"cancelled normal 1-1\nits caller said so\xff"
TIMED_OUT = b"timed_out - -\n" + outcomes.OVERDUE.encode()


@pytest.mark.parametrize(
    ("stored", "error_class", "words"),
    [
        (CANCELLED, RequestCancelledError, "was cancelled: its caller said so"),
        (b"cancelled - -\n", RequestCancelledError, "was cancelled"),
        (b"cancelled - -\n@home", RequestCancelledError, "was cancelled: @home"),
        (TIMED_OUT, RequestTimeoutError, "had no result in time: its deadline passed"),
    ],
)
def test_end_from_outside_is_raised_with_its_reason(
    stored: bytes, error_class: type[MillstreamError], words: str
) -> None:
    with pytest.raises(error_class, match=words) as caught:
        outcomes.open_stored(CODEC, REF, stored)

    assert caught.value.__dict__ == {"ref_id": "app.Model~" + REF.decode()}
    assert type(pickle.loads(pickle.dumps(caught.value))) is error_class


def test_request_that_timed_out_is_a_timeout_for_whoever_catches_those() -> None:
    with pytest.raises(TimeoutError, match="longer timeout_s"):
        outcomes.open_stored(CODEC, REF, TIMED_OUT)


@pytest.mark.parametrize("stored", [CANCELLED, TIMED_OUT])
def test_end_from_outside_reaches_a_dependant_as_it_is(stored: bytes) -> None:
    error = remote_errors.rebuild(pickle.loads(outcomes.error_body(CODEC, REF, stored)), "app.Other~x")

    assert isinstance(error, RequestCancelledError | RequestTimeoutError)
    assert error.ref_id == "app.Model~" + REF.decode()


def test_full_queue_names_the_deployment_and_what_to_do() -> None:
    error = outcomes.queue_full("app.Model")

    assert isinstance(error, BackPressureError) and error.deployment == "app.Model"
    assert "app.Model" in str(error) and "max_queued_requests" in str(error)


# large values


@pytest.mark.parametrize(
    ("stored", "part"),
    [
        (b"succeeded normal 1790000000000-3\n@70000", "1790000000000-3"),
        (b"succeeded - -\n@70000", "-"),
        (b"item 17\n@70000\n", "17"),
        (b"succeeded normal 1-1\n", None),
        (b"succeeded normal 1-1\n\x01p@", None),
        (b"item 17\n\x01p...\n", None),
        (b"cancelled normal 1-1\n@home", None),
        (b"failed normal 1-1\n\x01p", None),
        (b"running normal 1-1\n", None),
        (b"unknown", None),
        (b"", None),
    ],
)
def test_large_value_is_under_the_last_part_of_its_key(stored: bytes, part: str | None) -> None:
    assert outcomes.large_part(stored) == part


def test_large_value_is_opened_from_where_it_lies() -> None:
    large = CODEC.seal("value", REF, pickling.dump("large", what="value"))

    assert outcomes.open_stored(CODEC, REF, b"succeeded normal 1-1\n@70000", large) == "large"


def test_large_value_that_has_expired_is_not_found_and_says_how_large_it_was() -> None:
    with pytest.raises(RefNotFoundError, match=r"its value \(70000 bytes\) has expired"):
        outcomes.open_stored(CODEC, REF, b"succeeded normal 1-1\n@70000")


@pytest.mark.parametrize("kind", ["error", "request", "item"])
def test_large_value_is_verified_as_a_value(kind: Kind) -> None:
    large = CODEC.seal(kind, REF, pickling.dump("large", what="value"))

    with pytest.raises(SignatureError):
        outcomes.open_stored(CODEC, REF, b"succeeded normal 1-1\n@70000", large)


def test_items_are_told_from_outcomes_and_notices() -> None:
    for stored in (b"item 0\n\x01p\n", b"item 12345\n@70000\n"):
        assert outcomes.is_item(stored) and not outcomes.is_running(stored)
    for stored in (succeeded("item 0"), DEAD, CANCELLED, TIMED_OUT, b"running normal 1-1\n", b"succeeded normal 1-1\n"):
        assert not outcomes.is_item(stored)


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
