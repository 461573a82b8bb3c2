"""Every Python example of the documentation is run as a reader would, and says what the page says it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from millstream.cli import commands
from millstream.config import AutoscalingConfig, DeploymentConfig
from tests.docs import pages
from tests.docs.pages import Block

EXAMPLES = [block for page in pages.PAGES for block in pages.blocks(page, "python")]
SHELL = [block for page in pages.PAGES for block in pages.blocks(page, "sh")]
PROMISE = re.compile(r"^print\(.*\)  # (.*)$", re.MULTILINE)  # print(...)  # what it prints
HAS_TESTS = re.compile(r"^(async )?def test_", re.MULTILINE)
PYTEST = ["-m", "pytest", "-q", "-p", "millstream.pytest_plugin"]
MAKEFILE = pages.ROOT / "Makefile"


@pytest.mark.processes
@pytest.mark.parametrize("block", EXAMPLES, ids=lambda block: block.where)
def test_example_runs_and_prints_what_it_promises(block: Block, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(block.text)
    # Not the server of whoever runs the tests: an example starts its own, which ends with it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLSTREAM_")}

    ran = subprocess.run(
        [sys.executable, *(PYTEST if HAS_TESTS.search(block.text) else []), "example.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr
    promised = PROMISE.findall(block.text)
    assert not promised or ran.stdout.splitlines() == promised


def test_first_example_is_the_one_in_the_folder() -> None:
    first = next(pages.blocks(pages.README, "python"))

    _, _, code = (pages.ROOT / "examples" / "hello.py").read_text().partition('"""\n\n')

    assert first.text == code


# the command line


def described_commands() -> dict[str, list[str]]:
    """Command -> its arguments, from the README's table."""
    rows = pages.table(pages.README, "Run it")
    found = [pages.unquoted(row["command"]).split() for row in rows]
    assert all(words[0] == "millstream" for words in found)
    return {words[1]: words[2:] for words in found}


def test_readme_lists_the_commands_that_there_are() -> None:
    assert list(described_commands()) == [name for name, command in commands.commands.items() if not command.hidden]


@pytest.mark.parametrize("name", described_commands())
def test_command_takes_the_arguments_the_readme_gives(name: str) -> None:
    parameters = commands.commands[name].params
    expected = [p.human_readable_name.strip("[].") for p in parameters if isinstance(p, click.Argument)]

    assert described_commands()[name] == expected


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.where)
def test_commands_in_shell_examples_exist(block: Block) -> None:
    used = re.findall(r"^(?:\S+=\S+ )*(millstream|make) ([\w-]+)", block.text, re.MULTILINE)

    for program, name in used:
        if program == "millstream":
            assert name in commands.commands, f"{block.where} uses `millstream {name}`"
        elif MAKEFILE.exists():
            assert re.search(rf"^{name}:", MAKEFILE.read_text(), re.MULTILINE), f"{block.where} uses `make {name}`"


# the defaults


def described_defaults() -> list[tuple[object, str, str]]:
    heading = "Defaults"
    options = [(DeploymentConfig(), row) for row in pages.table(pages.README, heading)]
    fields = [(AutoscalingConfig(), row) for row in pages.table(pages.README, heading, number=2)]
    return [
        (config, pages.unquoted(next(iter(row.values()))), pages.unquoted(row["default"]))
        for config, row in options + fields
    ]


@pytest.mark.parametrize(("config", "name", "default"), described_defaults())
def test_default_is_the_one_in_the_code(config: object, name: str, default: str) -> None:
    value = getattr(config, {"autoscaling_config": "autoscaling"}.get(name, name))

    assert value == (
        float(default) if isinstance(value, float) else type(value)(default) if value is not None else None
    )
