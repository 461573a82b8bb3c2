"""What type checkers say of the files beside this one. Whether it is true, `test_truth.py` tries."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs import pages

HERE = Path(__file__).parent
ROOT = pages.ROOT
ERROR = re.compile(r"^\S+:(\d+): error: (.*?)(?:  \[[a-z-]+\])?$", re.MULTILINE)
STRICT = """[mypy]
strict = true

[mypy-cloudpickle.*]  # has no types, which mypy says of the modules in this folder, and not of an installed millstream
ignore_missing_imports = true
"""
pytestmark = pytest.mark.timeout(300)  # mypy reads all of millstream, and the standard library's types


def run(*command: str | Path) -> str:
    """What a type checker prints. It runs in the root of the project, so it is this millstream that it reads."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MYPY")}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.stderr == ""
    return ran.stdout


def mypy(config: Path, cache: Path, *files: Path) -> str:
    options = ["--config-file", str(config), "--cache-dir", str(cache), "--no-error-summary"]
    return run(sys.executable, "-m", "mypy", *options, *files)


def write_examples(folder: Path) -> list[Path]:
    """The examples of the documentation: the first with the plugin, the second without."""
    paths = []
    for number, block in enumerate(pages.blocks(ROOT / "docs" / "typing.md", "python")):
        paths.append(folder / f"example{number}.py")
        paths[-1].write_text(block.text)
    return paths


def test_mypy_needs_no_plugin_for_results(tmp_path: Path) -> None:
    config = tmp_path / "mypy.ini"
    config.write_text(STRICT)
    _, example = write_examples(tmp_path)

    assert mypy(config, tmp_path, HERE / "undecorated.py", example) == ""


def test_mypy_reports_mistakes_and_nothing_else(tmp_path: Path) -> None:
    """The second time it reads what it knows from its cache, where what the plugin has changed must be, too."""
    files = [HERE / f"{name}.py" for name in ("undecorated", "decorated", "methods", "oddities", "mistakes")]
    expected = [
        (number, part)
        for number, line in enumerate(files[-1].read_text().splitlines(), 1)
        for part in line.split("  # E: ")[1:]
    ]

    first, again = [mypy(ROOT / "pyproject.toml", tmp_path, *files, *write_examples(tmp_path)) for _ in range(2)]

    reported = [(int(number), message) for number, message in ERROR.findall(first)]
    assert len(reported) == len(first.splitlines())
    assert [number for number, _ in reported] == [number for number, _ in expected]
    assert [part for (_, message), (_, part) in zip(reported, expected, strict=True) if part not in message] == []
    assert again == first


@pytest.mark.skipif(not shutil.which("pyright"), reason="pyright is not installed")
def test_pyright_says_the_same_of_results(tmp_path: Path) -> None:
    _, example = write_examples(tmp_path)

    printed = run("pyright", "--pythonpath", sys.executable, HERE / "undecorated.py", HERE / "decorated.py", example)

    assert printed.strip() == "0 errors, 0 warnings, 0 informations"
