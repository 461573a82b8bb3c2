"""A user's exception, from the replica to the caller: its class, its fields, its traceback, whatever it is made of."""

import errno
import pickle
import threading
from typing import Any

import pytest

from millstream.broker import remote_errors
from millstream.errors import MillstreamError, ReplicaDiedError, SignatureError, TaskError

REF_ID = "app.Model~" + "r" * 22


class Plain(Exception):
    """Travels as it is."""


class WithFields(Exception):
    def __init__(self, code: int, detail: str) -> None:
        super().__init__(code, detail)
        self.code, self.detail = code, detail


class HoldsLock(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class CannotBeLoaded(Exception):
    """Pickles, but its constructor wants more than `args` holds."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class Final(Exception):
    """Cannot be combined with another class, once it is `closed`."""

    closed = False

    def __init_subclass__(cls) -> None:
        if Final.closed:
            raise RuntimeError("this class is final")


class HasNoText(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class UsersOwn(MillstreamError):
    """A user's error under our tree."""


def travelled(error: BaseException, where: str = "") -> Any:
    """What a caller would catch."""
    record = pickle.loads(remote_errors.capture(error, where=where))
    return remote_errors.rebuild(record, REF_ID)


def raised(error: BaseException) -> BaseException:
    """The error with a traceback."""
    try:
        raise error
    except BaseException as e:
        return e


@pytest.mark.parametrize(
    "error", [ValueError("bad"), KeyError("missing"), Plain("broken"), UnicodeError("x"), OSError()]
)
def test_error_is_caught_as_its_own_class_and_as_a_task_error(error: Exception) -> None:
    again = travelled(error)

    assert isinstance(again, TaskError)
    assert isinstance(again, type(error))
    assert type(again.cause) is type(error) and again.cause.args == error.args


def test_error_tells_request_place_and_remote_traceback() -> None:
    again = travelled(raised(Plain("broken")), where="replica r-1 of app.Model")

    text = str(again)
    assert again.ref_id == REF_ID and REF_ID in text
    assert "replica r-1 of app.Model" in text
    assert "raise error" in again.remote_traceback and again.remote_traceback in text
    assert text.splitlines()[0] == f"{__name__}.Plain: broken"


def test_traceback_contains_the_cause_of_the_cause() -> None:
    def fail() -> None:
        try:
            raise KeyError("first")
        except KeyError as e:
            raise Plain("second") from e

    try:
        fail()
    except Plain as e:
        again = travelled(e)

    assert "KeyError: 'first'" in again.remote_traceback
    assert "direct cause" in again.remote_traceback


def test_fields_of_the_user_are_attributes() -> None:
    again = travelled(WithFields(7, "why"))

    assert (again.code, again.detail) == (7, "why")


def test_fields_of_builtin_errors_are_attributes() -> None:
    missing = travelled(FileNotFoundError(errno.ENOENT, "No such file", "/model.bin"))
    undecodable = travelled(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"))

    assert (missing.errno, missing.strerror, missing.filename) == (errno.ENOENT, "No such file", "/model.bin")
    assert (undecodable.encoding, undecodable.object, undecodable.reason) == ("utf-8", b"\xff", "invalid start byte")


@pytest.mark.parametrize("error", [HoldsLock("locked"), CannotBeLoaded("this", "that")])
def test_error_that_cannot_travel_arrives_as_a_task_error_that_names_it(error: Exception) -> None:
    again = travelled(raised(error))

    assert isinstance(again, TaskError) and not isinstance(again, type(error))
    assert again.cause is None
    assert again.cause_type == f"{__name__}.{type(error).__name__}"
    assert str(error) in str(again) and "raise error" in str(again)


def test_error_whose_class_is_unknown_to_the_caller_arrives_as_a_task_error_that_names_it() -> None:
    record = pickle.loads(remote_errors.capture(raised(Plain("broken"))))
    record["cause"] = record["cause"].replace(b"Plain", b"Other")

    again = remote_errors.rebuild(record, REF_ID)

    assert type(again).__name__ == "TaskError"
    assert "Plain: broken" in str(again)


def test_error_whose_class_refuses_to_be_combined_arrives_as_a_task_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Final, "closed", True)

    again = travelled(Final("no more"))

    assert isinstance(again, TaskError) and not isinstance(again, Final)
    assert isinstance(again.cause, Final)
    assert "Final: no more" in str(again)


def test_error_without_a_text_arrives() -> None:
    again = travelled(raised(HasNoText()))

    assert isinstance(again, HasNoText)
    assert "raised ValueError" in str(again)


def test_error_passes_through_a_second_deployment_as_it_was() -> None:
    first = travelled(raised(Plain("deep down")), where="replica of A")

    second = travelled(raised(first), where="replica of B")

    assert isinstance(second, Plain)
    assert str(second) == str(first)


def test_caught_error_pickles_and_stays_what_it_is() -> None:
    again = pickle.loads(pickle.dumps(travelled(raised(WithFields(7, "why")))))

    assert isinstance(again, TaskError) and isinstance(again, WithFields)
    assert (again.code, again.ref_id) == (7, REF_ID)
    assert "raise error" in str(again)


def test_errors_of_ours_arrive_as_they_are() -> None:
    again = travelled(ReplicaDiedError("died", ref_id="x", attempts=[{"replica": "r-1"}]))

    assert type(again) is ReplicaDiedError
    assert vars(again) == {"ref_id": "x", "attempts": [{"replica": "r-1"}]}


def test_error_under_our_tree_that_cannot_travel_arrives_as_one_that_names_it() -> None:
    again = travelled(raised(UsersOwn("mine", lock=threading.Lock())))

    assert isinstance(again, MillstreamError)
    assert "UsersOwn: mine" in str(again)


def test_missing_attribute_is_an_attribute_error() -> None:
    again = travelled(Plain("x"))

    with pytest.raises(AttributeError, match="no_such_field"):
        _ = again.no_such_field
    assert not hasattr(travelled(SignatureError("x")), "no_such_field")
