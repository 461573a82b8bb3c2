"""What an error says in a terminal: the caller's line, the user's remote lines, and nothing of ours around them."""

import asyncio
import contextlib
import importlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millstream.errors import GetTimeoutError, TaskError
from millstream.handles.handle import DeploymentHandle
from millstream.handles.waiting import wait
from tests.handles.test_errors import UsersError
from tests.replica_helpers import Gate, Serving

OURS = str(Path(__file__).parents[2]) + "/"


class Model:
    """Fails, by itself or by what it calls."""

    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate or Gate()

    async def fail(self) -> None:
        raise UsersError(7, "no such thing")

    async def fail_in_groups(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.fail())
            group.create_task(self.fail())

    async def fail_with_a_note(self) -> None:
        error = UsersError(7, "no such thing")
        error.add_note("while loading weights.bin")
        raise error

    async def held(self) -> None:
        await self._gate.wait()

    async def one(self, x: Any) -> Any:
        return x

    def generate(self) -> Iterator[int]:
        yield 1


async def middle(inner: DeploymentHandle, method: str = "fail") -> Any:
    return await inner.options(method_name=method).call()


async def outer(middle: DeploymentHandle, inner: DeploymentHandle) -> Any:
    return await middle.call(inner)


async def translating(inner: DeploymentHandle) -> Any:
    try:
        return await inner.fail.call()
    except UsersError as e:
        raise LookupError("translated") from e


async def impatient(inner: DeploymentHandle) -> Any:
    ref = await inner.held.remote()
    return await asyncio.to_thread(ref.result, 0.01)


def printed(error: BaseException) -> str:
    """As the interpreter prints it when nobody catches it."""
    return "".join(traceback.format_exception(error))


def files(text: str) -> list[str]:
    """The files that a printed error goes through, short."""
    found = [line.split('"')[1] for line in text.splitlines() if line.strip(" |").startswith('File "')]
    return [name.removeprefix(OURS).removeprefix("millstream/") for name in found]


@pytest.mark.anyio
async def test_call_that_fails_shows_the_callers_line_and_the_remote_ones_only(serving: Serving) -> None:
    with pytest.raises(UsersError) as caught:
        await serving(Model).fail.call()

    assert files(printed(caught.value)) == ["tests/handles/test_error_texts.py"] * 2


@pytest.mark.anyio
async def test_ref_that_fails_shows_little_more(serving: Serving) -> None:
    ref = await serving(Model).fail.remote()
    with pytest.raises(UsersError) as caught:
        await ref

    assert files(printed(caught.value)) == [
        "tests/handles/test_error_texts.py",
        "handles/ref.py",
        "handles/cell.py",
        "tests/handles/test_error_texts.py",
    ]


@pytest.mark.anyio
async def test_error_through_three_deployments_is_the_innermost_one(serving: Serving) -> None:
    inner, between, top = serving(Model), serving(middle), serving(outer)

    with pytest.raises(UsersError) as caught:
        await top.call(between, inner)

    text = str(caught.value)
    assert caught.value.code == 7
    assert f"raised in request {inner.app_name}.Model~" in text and f"on behalf of {top.app_name}.outer~" in text
    assert files(text) == ["tests/handles/test_error_texts.py"], "of the innermost, not of those who passed it on"


@pytest.mark.anyio
async def test_error_raised_from_one_of_another_deployment_shows_both_without_our_frames(serving: Serving) -> None:
    inner = serving(Model)

    with pytest.raises(LookupError) as caught:
        await serving(translating).call(inner)

    text = str(caught.value)
    assert files(text) == ["tests/handles/test_error_texts.py"] * 3
    assert "direct cause of the following exception" in text
    assert isinstance(caught.value.cause.__cause__, UsersError)  # type: ignore[attr-defined]


@pytest.mark.anyio
async def test_group_shows_its_parts_without_our_frames_and_can_be_taken_apart(serving: Serving) -> None:
    caught: list[BaseException] = []
    try:
        await serving(Model).fail_in_groups.call()
    except* UsersError as group:
        caught += group.exceptions

    assert [type(one) for one in caught] == [UsersError] * 2


@pytest.mark.anyio
async def test_note_is_printed(serving: Serving) -> None:
    with pytest.raises(UsersError) as caught:
        await serving(Model).fail_with_a_note.call()

    assert printed(caught.value).splitlines()[-1] == "while loading weights.bin"


@pytest.mark.anyio
async def test_error_of_ours_in_a_deployment_says_where_in_the_users_code(serving: Serving) -> None:
    gate = Gate()
    inner = serving(Model, gate)

    with pytest.raises(GetTimeoutError) as caught:
        await serving(impatient).call(inner)
    gate.open()

    assert not isinstance(caught.value, TaskError)
    (note,) = caught.value.__notes__
    assert "in impatient" in note and files(note)[-1].endswith("concurrent/futures/thread.py")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("predict", (), r"app.Model has no method 'predict'; available methods: "),
        ("one", (1, 2), "takes 2 positional arguments but 3 were given"),
        ("generate", (), "is a generator; call it with handle.stream"),
    ],
)
async def test_call_that_does_not_fit_shows_no_remote_frames(
    serving: Serving, method: str, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(Exception, match=message) as caught:
        await serving(Model).options(method_name=method).call(*arguments)

    text = printed(caught.value)
    assert files(text) == ["tests/handles/test_error_texts.py"]
    assert "remote traceback" not in text


@contextlib.contextmanager
def passing_module(folder: Path) -> Iterator[None]:
    """A module `passing` with a class `Thing` in it, which nobody can import any more afterwards."""
    (folder / "passing.py").write_text("class Thing: pass\n")
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("passing", None)


@pytest.mark.anyio
async def test_argument_whose_class_the_replica_cannot_import_is_told_so(serving: Serving, tmp_path: Path) -> None:
    handle = serving.deploy_only(Model)
    with passing_module(tmp_path):
        future = handle.one.call(importlib.import_module("passing").Thing())
    serving.start_replica(handle, Model)

    with pytest.raises(ModuleNotFoundError, match="passing") as caught:
        await future

    text = printed(caught.value)
    assert "an argument is of a class that cannot be imported where app.Model runs" in text
    assert files(text) == ["tests/handles/test_error_texts.py"]


def test_value_whose_class_the_caller_cannot_import_is_told_so(serving: Serving, tmp_path: Path) -> None:
    async def make() -> Any:
        return importlib.import_module("passing").Thing()

    with passing_module(tmp_path):
        ref = serving.sync(make).remote()
        wait([ref])

    with pytest.raises(ModuleNotFoundError, match="passing") as caught:
        ref.result(5)
    assert caught.value.__notes__ == [f"the value of {ref.id} is of a class that cannot be imported here"]


@pytest.mark.anyio
async def test_text_begins_with_the_error_and_ends_with_it(serving: Serving) -> None:
    async def check(x: int) -> None:
        if x <= 0:
            raise ValueError(f"x must be positive, not {x}")

    with pytest.raises(ValueError, match="positive") as caught:
        await serving(check).call(-1)

    request, line = caught.value.ref_id, check.__code__.co_firstlineno + 2  # type: ignore[attr-defined]
    head, _, rest = str(caught.value).partition("; remote traceback:\n")
    assert head.splitlines()[:2] == ["ValueError: x must be positive, not -1", ""]
    assert head.splitlines()[2].startswith(f"raised in request {request} (replica r-")
    assert [line for line in rest.splitlines() if "^" not in line] == [
        "Traceback (most recent call last):",
        f'  File "{__file__}", line {line}, in check',
        '    raise ValueError(f"x must be positive, not {x}")',
        "ValueError: x must be positive, not -1",
    ]
