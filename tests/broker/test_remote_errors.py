"""A user's exception, from the replica to the caller: its class, its fields, its traceback, whatever it is made of."""

import errno
import pickle
import threading
from typing import Any, Self

import pytest

from millstream.broker import remote_errors
from millstream.errors import MillstreamError, RefNotFoundError, ReplicaDiedError, SignatureError, TaskError

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


class WantsKeyword(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class WantsKeywordEarly(Exception):
    def __new__(cls, *, code: int) -> Self:
        return super().__new__(cls, f"code {code}")

    def __init__(self, *, code: int) -> None:
        self.code = code


class Slotted(Exception):
    __slots__ = ("code", "lock")
    code: int
    lock: Any


class SeveralBuiltins(OSError, ValueError):
    """Its layout is that of its first class."""


class OtherWayRound(ValueError, OSError):
    """Its layout is that of its second class."""


class LooksUp(KeyError, AttributeError):
    """Of two that are no relatives."""


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
    assert "raise error" in again.remote_traceback and again.remote_traceback.rstrip() in text
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


@pytest.mark.parametrize(
    "error", [HoldsLock("locked"), CannotBeLoaded("this", "that"), WantsKeyword(code=3), WantsKeywordEarly(code=3)]
)
def test_error_that_cannot_be_pickled_or_built_arrives_as_what_it_is_without_its_constructor(error: Exception) -> None:
    again = travelled(raised(error))

    assert isinstance(again, TaskError) and isinstance(again, type(error))
    assert type(again.cause) is type(error) and again.cause.args == error.args
    assert again.cause_type == f"{__name__}.{type(error).__name__}"
    assert str(error) in str(again) and "raise error" in str(again)
    assert getattr(again, "code", None) == getattr(error, "code", None)
    assert not hasattr(again, "lock"), "what of it cannot be pickled is left behind"


def test_error_with_slots_keeps_what_is_in_them() -> None:
    error = Slotted("broken")
    error.code, error.lock = 7, None

    again = travelled(error)

    assert isinstance(again, Slotted) and isinstance(again, TaskError)
    assert (again.code, again.lock, again.args) == (7, None, (again.cause,))


@pytest.mark.parametrize(
    "error", [SeveralBuiltins(errno.ENOENT, "gone", "a.txt"), OtherWayRound(errno.ENOENT, "gone"), LooksUp("x")]
)
def test_error_of_several_builtin_classes_is_caught_as_each_of_them(error: Exception) -> None:
    again = travelled(error)

    assert isinstance(again, TaskError)
    assert all(isinstance(again, cls) for cls in type(error).__mro__)
    assert getattr(again, "errno", None) == getattr(error, "errno", None)


def test_group_is_caught_as_a_group_and_in_its_parts() -> None:
    inner = ExceptionGroup("inner", [HoldsLock("held"), WantsKeyword(code=3)])
    again = travelled(raised(ExceptionGroup("outer", [ValueError("bad"), inner])))

    assert isinstance(again, TaskError) and isinstance(again, ExceptionGroup)
    assert again.message == "outer" and [type(one) for one in again.exceptions] == [ValueError, ExceptionGroup]
    caught = list[BaseException]()
    try:
        raise again
    except* ValueError as group:
        caught += group.exceptions
    except* (HoldsLock, WantsKeyword) as group:
        (nested,) = group.exceptions
        caught += nested.exceptions  # type: ignore[union-attr]
    assert [type(one) for one in caught] == [ValueError, HoldsLock, WantsKeyword]
    assert "ValueError: bad" in str(again) and "WantsKeyword: code 3" in str(again)


def test_group_that_would_end_the_caller_arrives_as_a_task_error() -> None:
    again = travelled(BaseExceptionGroup("both", [KeyboardInterrupt(), ValueError("bad")]))

    assert type(again).__name__ == "TaskError" and isinstance(again.cause, BaseExceptionGroup)


def test_notes_arrive() -> None:
    error = Plain("broken")
    error.add_note("while loading the model")

    again = travelled(raised(error))

    assert again.__notes__ == ["while loading the model"]
    assert "while loading the model" in again.remote_traceback


def test_cause_keeps_what_it_was_raised_from() -> None:
    def fail() -> None:
        try:
            try:
                raise KeyError("first")
            except KeyError:
                raise HoldsLock("second")  # noqa: B904 - in the handling of the other, not from it
        except HoldsLock as e:
            raise Plain("third") from e

    try:
        fail()
    except Plain as e:
        again = travelled(e)

    second = again.cause.__cause__
    assert isinstance(second, HoldsLock) and second.__cause__ is None
    assert isinstance(second.__context__, KeyError) and second.__context__.args == ("first",)
    assert again.__cause__ is None, "it would be printed twice"


def test_suppressed_context_stays_so() -> None:
    def fail() -> None:
        try:
            raise KeyError("first")
        except KeyError:
            raise Plain("second") from None

    try:
        fail()
    except Plain as e:
        again = travelled(e)

    assert again.cause.__context__ is None and "first" not in str(again)


@pytest.mark.parametrize(
    "error", [ValueError("x" * 5_000_000), WithFields(7, "x" * 5_000_000), HoldsLock("x" * 5_000_000)]
)
def test_huge_message_arrives_with_its_beginning_and_its_end(error: Exception) -> None:
    captured = remote_errors.capture(raised(error))
    again = travelled(raised(error))

    assert len(captured) < 300_000
    assert isinstance(again, type(error)) and getattr(again, "code", 7) == 7
    assert str(again).startswith(f"{type(error).__module__}.{type(error).__name__}".removeprefix("builtins."))
    assert "characters left out" in str(again) and "raise error" in str(again)


def test_endless_recursion_arrives_in_short() -> None:
    def recurse() -> None:
        recurse()

    with pytest.raises(RecursionError) as caught:
        recurse()

    again = travelled(caught.value)
    assert isinstance(again, RecursionError)
    assert "Previous line repeated" in str(again) and len(str(again)) < 10_000


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


def test_request_it_was_raised_in_is_named_and_the_one_it_was_raised_for() -> None:
    inner = "app.Inner~" + "i" * 22
    error = pickle.loads(remote_errors.capture(raised(Plain("x")), where="replica r-1", request=inner))

    direct, passed_on = remote_errors.rebuild(error, inner), remote_errors.rebuild(error, REF_ID)
    further = remote_errors.rebuild(pickle.loads(remote_errors.capture(raised(passed_on))), "app.Top~" + "t" * 22)

    assert f"raised in request {inner} (replica r-1); remote traceback:" in str(direct)
    assert f"raised in request {inner} (replica r-1), on behalf of {REF_ID}; remote traceback:" in str(passed_on)
    assert f"raised in request {inner} (replica r-1), on behalf of app.Top~" in str(further)


def test_error_of_ours_that_code_of_the_user_met_says_where_once() -> None:
    again = travelled(raised(RefNotFoundError("no such ref", ref_id="x")), where="replica of A")
    further = travelled(raised(again), where="replica of B")

    assert type(further) is RefNotFoundError and further.ref_id == "x" and str(further) == "no such ref"
    (note,) = further.__notes__
    assert "replica of A" in note and "raise error" in note


def test_error_before_any_code_of_the_user_shows_no_frames_of_ours() -> None:
    error = TypeError("takes 1 positional argument").with_traceback(traceback_of_ours())

    again = travelled(error)

    assert "File" not in str(again) and "Traceback" not in str(again)
    assert again.remote_traceback == "TypeError: takes 1 positional argument\n"


def traceback_of_ours() -> Any:
    """A traceback that consists of frames of ours."""
    try:
        remote_errors.rebuild({"type": 1, "text": "", "traceback": "", "where": ""}, REF_ID)
    except Exception as e:
        return e.__traceback__ and e.__traceback__.tb_next


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
