"""Equal where replicas may go on as they are; different wherever their code could be another one."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from millstream.broker import fingerprint
from millstream.broker.codec import Codec
from millstream.broker.definitions import Definition, code_of, seal
from millstream.config import IN_PLACE, RESTARTING, DeploymentConfig

CODEC = Codec(b"a secret", "ms", "app.Model")
MODEL = """
import helper
from millstream import serve
from package import inner as renamed

@serve.deployment(user_config={"n": 1}, sync_threads=2)
class Model:
    def __init__(self, size=0):
        import package.late

    def __call__(self):
        return helper.answer()

app = Model.options(num_replicas=1).bind(3)
"""


class Project:
    """A folder of modules, as a person works on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, path: str, text: str) -> None:
        (self.folder / path).parent.mkdir(exist_ok=True)
        (self.folder / path).write_text(text)

    def replace(self, path: str, old: str, new: str) -> None:
        text = (self.folder / path).read_text()
        assert old in text
        self.write(path, text.replace(old, new))

    def code(self, *args: Any, **options: Any) -> str:
        """Of what a deploy stores now: its module is imported afresh."""
        sys.modules.pop("its_app", None)
        importlib.invalidate_caches()
        return code_of_target(importlib.import_module("its_app").Model.func_or_class, *args, **options)


def code_of_target(target: Any, *args: Any, **options: Any) -> str:
    envelope = seal(CODEC, Definition(target, args, {}))
    return code_of(CODEC, envelope, DeploymentConfig().updated(options))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    project = Project(tmp_path)
    project.write("its_app.py", MODEL)
    project.write("helper.py", "def answer():\n    return 42\n")
    project.write("package/__init__.py", "")
    project.write("package/inner.py", "from . import deeper\n")
    project.write("package/deeper.py", "x = 1\n")
    project.write("package/late.py", "x = 1\n")
    project.write("package/unrelated.py", "x = 1\n")
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield project
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_nothing_changed(project: Project) -> None:
    assert project.code(1, "two") == project.code(1, "two")


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("its_app.py", "helper.answer()", "helper.answer() + 1"),
        ("helper.py", "42", "43"),
        ("package/__init__.py", "", "y = 1"),
        ("package/inner.py", "from . import deeper", "from . import deeper as d"),
        ("package/deeper.py", "1", "2"),
        ("package/late.py", "1", "2"),
        ("its_app.py", "sync_threads=2", "sync_threads=3"),
        ("its_app.py", "bind(3)", "bind(4)"),
    ],
)
def test_change_of_a_file_that_it_imports_is_seen(project: Project, path: str, old: str, new: str) -> None:
    before = project.code()

    project.replace(path, old, new)

    assert project.code() != before


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("package/unrelated.py", "1", "2"),
        ("its_app.py", '{"n": 1}', '{"n": 2}'),
        ("its_app.py", "num_replicas=1", "num_replicas=5, max_ongoing_requests=3"),
        ("its_app.py", "import helper\n", "import helper  # it helps\n"),
    ],
)
def test_change_that_needs_no_restart_is_none(project: Project, path: str, old: str, new: str) -> None:
    before = project.code()

    project.replace(path, old, new)

    assert project.code() == before


def test_options_of_something_else_are_code(project: Project) -> None:
    project.replace("helper.py", "return 42", "return thing.options(num_replicas=1)")
    before = project.code()

    project.replace("helper.py", "num_replicas=1", "num_replicas=2")

    assert project.code() != before


def test_file_that_is_no_python_is_taken_as_it_is(project: Project) -> None:
    project.write("package/late.py", "x.options((((")
    before = project.code()

    project.replace("package/late.py", "(((", "((((")

    assert project.code() != before


def test_module_that_is_loaded_counts_though_nothing_names_it(project: Project) -> None:
    importlib.import_module("package.unrelated")
    before = project.code()

    project.replace("package/unrelated.py", "1", "2")

    assert project.code() != before


def test_constructor_arguments_count(project: Project) -> None:
    assert len({project.code(), project.code(1), project.code(2), project.code("a" * 32), project.code("b" * 32)}) == 5


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"user_config": 3, "num_replicas": 7, "result_ttl_s": 5, "health_check_period_s": 1}, False),
        ({"num_replicas": "auto", "max_ongoing_requests": 5}, False),
        ({"sync_threads": 2}, True),
        ({"start_method": "spawn"}, True),
        ({"resources": {"num_gpus": 1}}, True),
        ({"version": "2"}, True),
    ],
)
def test_options_count_where_a_process_cannot_change_them(
    project: Project, options: dict[str, Any], differs: bool
) -> None:
    assert (project.code(**options) != project.code()) is differs


def test_every_option_is_either_applied_in_place_or_restarts() -> None:
    names = {field.name for field in fields(DeploymentConfig)}

    assert names == IN_PLACE | RESTARTING, "decide what a new option needs, and do it in replicas/updating.py"
    assert not IN_PLACE & RESTARTING


def test_other_folder_or_import_path_is_another_place(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = project.code()
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(tmp_path)
        assert project.code() != before
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "package")])
    assert project.code() != before


# by value


def by_value(answer: Callable[[], Any], default: object = None) -> type:
    class Model:
        """Defined in a function, so it cannot be imported."""

        def __call__(self, x: object = default) -> Any:
            return answer()

    return Model


def test_class_that_goes_by_value_is_its_code_and_what_it_refers_to() -> None:
    def one() -> int:
        return 1

    def two() -> int:
        return 2

    model = by_value(one)

    assert code_of_target(model) == code_of_target(model)
    assert len({code_of_target(by_value(one)), code_of_target(by_value(two)), code_of_target(by_value(one, 3))}) == 3


SCRIPT = """
import sys
from millstream.broker.codec import Codec
from millstream.broker.definitions import Definition, code_of, seal
from millstream.config import DeploymentConfig

CODEC = Codec(b"a secret", "ms", "app.Model")
AMOUNT = 1

class Model:
    def __init__(self, x): self.x = x
    async def __call__(self, y):
        return (self.x + y + AMOUNT, "two words", ["a", "a"])

print(code_of(CODEC, seal(CODEC, Definition(Model, (1, "a"), {"k": "a"})), DeploymentConfig()))
"""


def test_script_that_runs_again_has_the_same_code_until_it_is_changed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def run(text: str) -> str:
        (tmp_path / "script.py").write_text(text)
        done = subprocess.run(
            [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert run(SCRIPT) == run(SCRIPT)
    assert run(SCRIPT) != run(SCRIPT.replace("AMOUNT = 1", "AMOUNT = 2"))


# the parts


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        (b"import a", "", {"a"}),
        (b"import a.b as c, d", "", {"a", "a.b", "d"}),
        (b"    from a.b import c, d as e  # why", "", {"a", "a.b", "a.b.c", "a.b.d"}),
        (b"from a import (\n    b,\n    c,\n)", "", {"a", "a.b", "a.c"}),
        (b"from . import x", "p.q", {"p", "p.q", "p.q.x"}),
        (b"from .x import y", "p.q", {"p", "p.q", "p.q.x", "p.q.x.y"}),
        (b"from ..x import y", "p.q", {"p", "p.x", "p.x.y"}),
        (b"x = 1\nimportant = 2", "", set()),
    ],
)
def test_imports_are_found_with_their_packages(source: bytes, package: str, expected: set[str]) -> None:
    assert expected <= set(fingerprint._imports(source, package)) <= expected | {"a.b.as", "a.b.e"}


def test_libraries_and_we_ourselves_are_no_code_of_the_user() -> None:
    assert fingerprint._is_library(pytest.__file__) and fingerprint._is_library(subprocess.__file__)
    assert not fingerprint._is_library(__file__)
    assert not any(name.startswith("millstream") for name in fingerprint._loaded())
