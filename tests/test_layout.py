"""The folders at the root are the packages of `millstream`: on disk, in the wheel's table, and by import name."""

import fnmatch
import importlib.util
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOT_PACKAGES = {"tests", "examples", "benchmarks", "chaos", "docs", "docker", "build", "dist"}


def setuptools_table() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


FOLDERS: dict[str, str] = setuptools_table()["package-dir"]
PARTS = sorted(FOLDERS.keys() - {"millstream"})


def test_every_root_folder_with_code_is_in_the_table() -> None:
    with_code = {
        folder.name
        for folder in ROOT.iterdir()
        if folder.is_dir() and not folder.name.startswith(".") and any(folder.glob("*.py"))
    }

    assert with_code - NOT_PACKAGES <= set(FOLDERS.values())


def test_every_package_on_disk_is_in_the_table() -> None:
    links = [path for path in (ROOT / "millstream").iterdir() if path.is_symlink()]
    on_disk = {
        ".".join((name, *path.parent.relative_to(ROOT / folder).parts))
        for name, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
        if not any(path.is_relative_to(link) for link in links)
    }

    assert on_disk <= set(setuptools_table()["packages"])


def test_table_lists_each_folder_under_its_own_name() -> None:
    assert {f"millstream.{folder}" for folder in FOLDERS.values()} - {"millstream.millstream"} == set(PARTS)
    assert set(setuptools_table()["packages"]) >= FOLDERS.keys()


@pytest.mark.parametrize("name", PARTS)
def test_link_leads_to_the_folder_at_the_root(name: str) -> None:
    link = ROOT / "millstream" / FOLDERS[name]

    assert link.is_symlink(), f"{link} is no link: check out with core.symlinks=true"
    assert link.readlink() == Path("..") / FOLDERS[name]
    assert (ROOT / FOLDERS[name]).is_dir()


@pytest.mark.parametrize("name", PARTS)
def test_import_name_leads_to_the_folder_at_the_root(name: str) -> None:
    spec = importlib.util.find_spec(name)

    assert spec is not None
    places = [Path(place).resolve() for place in spec.submodule_search_locations or ()]
    assert ROOT / FOLDERS[name] in places


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_files_that_are_not_python_travel_in_the_wheel(name: str) -> None:
    patterns = setuptools_table()["package-data"].get(name, [])
    folder = ROOT / FOLDERS[name]
    files = [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and not path.is_relative_to(folder / "broker")
    ]

    left_out = [file for file in files if not any(fnmatch.fnmatch(file, pattern) for pattern in patterns)]

    assert left_out == []


def test_nothing_was_imported_by_its_bare_name() -> None:
    bare = {name.removeprefix("millstream.") for name in PARTS}

    assert bare & sys.modules.keys() == set()
