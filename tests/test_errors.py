"""The error tree: as drawn, picklable with all fields, and caught the way users expect."""

import copy
import inspect
import pickle
import re

import pytest

from millstream import errors
from millstream.errors import MillstreamError, ReplicaDiedError, TaskError

CLASSES = [member for _, member in inspect.getmembers(errors, inspect.isclass) if issubclass(member, MillstreamError)]
LINE = re.compile(r"^    (?:[├└]── )?(\w+Error)\b(.*)$", re.MULTILINE)
DRAWN = dict(LINE.findall(inspect.getdoc(errors) or ""))


def test_tree_in_the_docstring_lists_exactly_the_classes_there_are() -> None:
    assert set(DRAWN) == {cls.__name__ for cls in CLASSES}


@pytest.mark.parametrize("cls", CLASSES)
def test_error_stands_in_the_tree_where_it_is_drawn(cls: type[MillstreamError]) -> None:
    also = re.search(r"\(also an? (\w+)\)", DRAWN[cls.__name__])
    expected = {MillstreamError.__name__, *([also[1]] if also else [])}

    assert cls is MillstreamError or {base.__name__ for base in cls.__bases__} == expected


@pytest.mark.parametrize("cls", CLASSES)
def test_error_pickles_with_message_and_fields(cls: type[MillstreamError]) -> None:
    error = cls("what, which one, what to do", ref_id="app.Model~x", attempts=[{"replica": "r-1"}], message="odd name")

    again = pickle.loads(pickle.dumps(error))

    assert type(again) is cls
    assert str(again) == str(error) == "what, which one, what to do"
    assert again.args == error.args
    assert vars(again) == vars(error)


@pytest.mark.parametrize("cls", CLASSES)
def test_error_with_a_note_pickles_and_copies(cls: type[MillstreamError]) -> None:
    error = cls("what", ref_id="x")
    error.add_note("seen by a caller")

    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (type(again), str(again), vars(again)["ref_id"]) == (cls, "what", "x")


@pytest.mark.parametrize("cls", CLASSES)
def test_error_is_documented(cls: type[MillstreamError]) -> None:
    assert cls.__doc__ and cls.__doc__.splitlines()[0].endswith(".")


def test_fields_are_attributes() -> None:
    error = ReplicaDiedError("died", ref_id="app.Model~x", attempts=[{"replica": "r-1", "attempt": 1}])

    assert (error.ref_id, error.attempts[0]["replica"]) == ("app.Model~x", "r-1")


def test_fields_nobody_set_have_their_defaults() -> None:
    error = TaskError("raised")

    assert (error.cause, error.cause_type, error.remote_traceback, error.ref_id) == (None, "", "", "")


@pytest.mark.parametrize("name", ["GetTimeoutError", "RequestTimeoutError"])
def test_timeouts_are_caught_as_timeouts(name: str) -> None:
    with pytest.raises(TimeoutError, match="too late"):
        raise getattr(errors, name)("too late")
