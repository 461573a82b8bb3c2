"""What is public: `__all__` lists exactly that, all of it can be imported, and the version is one."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import millstream
from millstream import errors, serve

ROOT = Path(__file__).parent.parent
FRONT = ast.parse((ROOT / "millstream" / "__init__.py").read_text())


def for_type_checkers() -> set[str]:
    """The names under `if TYPE_CHECKING`: what an editor knows of."""
    (block,) = [node for node in FRONT.body if isinstance(node, ast.If)]
    return {
        alias.asname or alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


@pytest.mark.parametrize("module", [millstream, serve])
def test_all_lists_each_name_once(module: Any) -> None:
    assert len(module.__all__) == len(set(module.__all__))
    assert sorted(set(module.__all__) - {"__version__", "serve"}) == [
        name for name in module.__all__ if name not in ("__version__", "serve")
    ]


@pytest.mark.parametrize("module", [millstream, serve])
def test_everything_listed_is_there(module: Any) -> None:
    missing = [name for name in module.__all__ if not hasattr(module, name)]

    assert missing == []


def test_every_name_that_type_checkers_see_is_listed_and_no_other() -> None:
    assert for_type_checkers() | {"__version__"} == set(millstream.__all__)


def test_every_error_is_public() -> None:
    raised = {
        name for name, member in inspect.getmembers(errors, inspect.isclass) if member.__module__ == errors.__name__
    }

    assert raised <= set(millstream.__all__)


def test_what_serve_defines_in_public_is_listed() -> None:
    defined = {
        name
        for name, member in vars(serve).items()
        if getattr(member, "__module__", "") == serve.__name__ and not name.startswith("_")
    }

    for_the_command_line = {"deploy", "deploy_only"}
    assert defined - set(serve.__all__) == for_the_command_line


def test_dir_lists_what_is_public() -> None:
    assert set(millstream.__all__) <= set(dir(millstream))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'millstream' has no attribute 'remote'"):
        millstream.remote  # noqa: B018


def test_importing_the_package_loads_nothing_of_it() -> None:
    script = (
        "import sys, millstream; print([m for m in sys.modules if m.startswith(('millstream.', 'redis', 'asyncio'))])"
    )

    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout

    assert printed == "[]\n"


@pytest.mark.parametrize("name", sorted(set(millstream.__all__) - {"__version__"}))
def test_public_name_is_documented(name: str) -> None:
    doc = inspect.getdoc(getattr(millstream, name))

    assert doc and doc.splitlines()[0].endswith((".", "?"))


@pytest.mark.parametrize("name", sorted(serve.__all__))
def test_public_name_of_serve_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(serve, name))


def test_every_module_opens_with_its_job() -> None:
    names = [module.name for module in pkgutil.walk_packages(millstream.__path__, "millstream.")]
    without = [name for name in names if not name.endswith("__main__") and not importlib.import_module(name).__doc__]

    assert without == []


# the version


def test_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert millstream.__version__ == project["version"]


def test_version_is_the_newest_of_the_changelog() -> None:
    changelog = ROOT / "CHANGELOG.md"
    if not changelog.exists():
        pytest.skip("there is no CHANGELOG.md yet")

    newest = re.search(r"^## \[?v?(\d+\.\d+\.\d+\S*?)\]?(\s|$)", changelog.read_text(), re.MULTILINE)

    assert newest is not None and newest[1] == millstream.__version__
