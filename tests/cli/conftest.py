"""Each test of the command line has a folder of its own, and no process may be left in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.shell import HELLO, Shell
from tests.servers import Server


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A folder with hello.py in it."""
    yield from open_shell(tmp_path)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A folder where `millstream run hello:app` serves, shared by the tests of a module."""
    for shell in open_shell(tmp_path_factory.mktemp("serving")):
        shell.run()
        yield shell


def open_shell(folder: Path) -> Iterator[Shell]:
    shell = Shell(folder)
    shell.write("hello.py", HELLO)
    yield shell
    assert list(shell.close()) == []


@pytest.fixture
def valkey() -> Iterator[Server]:
    """A server that is not embedded, for this test alone."""
    server = Server("valkey").start()
    yield server
    server.stop()
