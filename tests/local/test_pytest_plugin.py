"""The fixtures for users' tests, in pytest sessions of their own: as a project that has millstream installed sees them."""

import importlib
import re
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.local.conftest import OURS, ROOT

pytestmark = pytest.mark.processes

APP = """
import asyncio, threading, time
import pytest
import millstream
from millstream import serve

@serve.deployment
class Model:
    async def __call__(self, x):
        return x + 1

    def stuck(self):
        time.sleep(3600)

@pytest.fixture
def anyio_backend():
    return "asyncio"
"""


@dataclass(frozen=True)
class Session:
    """How a pytest session ended."""

    passed: int
    failed: int
    output: str
    left: list[Path]


@pytest.fixture
def project(tmp_path: Path) -> "Project":
    return Project(tmp_path)


class Project:
    """A project with tests. Its temporary files are in `tmp`, where whatever stays is ours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.path = [str(ROOT)]

    def write(self, name: str, source: str) -> None:
        (self.folder / name).write_text(textwrap.dedent(source))

    def test(self, source: str, *arguments: str) -> Session:
        """Run these tests, on top of APP."""
        self.write("test_it.py", APP + textwrap.dedent(source))
        return self.run("-p", "millstream.pytest_plugin", *arguments)

    def run(self, *arguments: str) -> Session:
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(self.path), "TMPDIR": str(self.temporary)}
        environment |= {name: "" for name in OURS if name != "MILLSTREAM_STATE"}
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-W", "error", "--strict-markers", "-p", "no:cacheprovider", *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", ran.stdout)}
        return Session(
            found.get("passed", 0),
            found.get("failed", 0) + found.get("error", 0),
            ran.stdout + ran.stderr,
            [path for path in self.temporary.iterdir() if path.name.startswith("millstream-")],
        )


# the fixtures


def test_tests_that_block_and_tests_on_a_loop_serve_in_one_line(project: Project) -> None:
    session = project.test(
        """
        def test_blocking(serve_local):
            assert serve_local(Model.bind()).call(1) == 2

        @pytest.mark.anyio
        async def test_on_a_loop(serve_local):
            handle = await serve_local.run_async(Model.bind(), name="other")
            assert handle.app_name == "other"
            assert await handle.call(1) == 2
            assert [x async for x in handle.map([1, 2])] == [2, 3]

        @pytest.fixture
        async def model(serve_local):
            return await serve_local.run_async(Model.bind())

        @pytest.mark.anyio
        async def test_with_a_fixture_of_its_own(model):
            assert await model.call(2) == 3
        """
    )

    assert (session.passed, session.failed) == (3, 0), session.output
    assert session.left == []


def test_every_test_begins_with_an_empty_server(project: Project) -> None:
    session = project.test(
        """
        servers = set()

        @pytest.mark.parametrize("n", [1, 2])
        def test_one_after_the_other(serve_local, millstream_server, n):
            servers.add(millstream_server.url)
            assert serve.status().applications == {}
            handle = serve_local(Model.bind())
            assert handle.options(idempotency_key="the same").call(n) == n + 1
            assert len(servers) == 1
        """
    )

    assert (session.passed, session.failed) == (2, 0), session.output


def test_code_under_test_serves_in_local_mode_too_and_may_shut_down(project: Project) -> None:
    session = project.test(
        """
        def main():
            handle = serve.run(Model.bind())
            print(handle.call(1), len(threading.enumerate()) > 2)
            serve.shutdown()

        def test_main(serve_local, capsys):
            main()
            assert capsys.readouterr().out == "2 True\\n"

        def test_the_next_one(serve_local):
            assert serve_local(Model.bind()).call(2) == 3

        def test_one_without_the_fixture():
            assert not millstream.is_initialized()
            assert not [t for t in threading.enumerate() if t.name.startswith("millstream")]
        """
    )

    assert (session.passed, session.failed) == (3, 0), session.output
    assert session.left == []


def test_test_that_fails_in_the_middle_does_not_hold_up_the_next(project: Project) -> None:
    session = project.test(
        """
        started = []

        def test_fails(serve_local):
            serve_local(Model.bind()).stuck.remote()
            started.append(time.monotonic())
            assert False

        def test_next(serve_local):
            assert serve_local(Model.bind()).call(1) == 2
            assert time.monotonic() - started[0] < 10  # and not the 20 s that a request has to finish
        """
    )

    assert (session.passed, session.failed) == (1, 1), session.output


def test_application_of_a_wider_fixture_stays(project: Project) -> None:
    session = project.test(
        """
        @pytest.fixture(scope="module")
        def shared(millstream_server):
            millstream.init(millstream_server.url, secret_key=millstream_server.secret_key)
            yield serve.run(Model.bind(), name="shared", local=True)
            serve.shutdown()

        @pytest.mark.parametrize("n", [1, 2])
        def test_both(serve_local, shared, n):
            assert set(serve.status().applications) == {"shared"}
            assert serve_local(Model.bind()).call(n) == shared.call(n)

        def test_that_it_has_stayed(shared):
            assert set(serve.status().applications) == {"shared"}
        """
    )

    assert (session.passed, session.failed) == (3, 0), session.output
    assert session.left == []


def test_server_can_be_another_one(project: Project) -> None:
    session = project.test(
        """
        from millstream.broker.connection import open_control
        from millstream.config import Settings
        from millstream.tree import Tree

        @pytest.fixture(scope="session")
        def millstream_server():
            tree = Tree()
            settings = tree.start_server(None)
            yield Settings(settings.url, "mine", settings.secret_key)
            tree.close()

        async def write(registry):
            await registry.client.set("mine:kept", "1")

        async def read(registry):
            return await registry.client.get("mine:kept")

        @pytest.mark.parametrize("n", [1, 2])
        def test_nothing_is_removed_there(serve_local, n):
            from millstream.runtime import with_registry
            if n == 2:
                assert with_registry(read) == b"1"
            with_registry(write)
            assert serve_local(Model.bind()).call(n) == n + 1
        """
    )

    assert (session.passed, session.failed) == (2, 0), session.output


# the plugin


def install(project: Project) -> None:
    """As pip does, as far as pytest looks: the entry point, and the files that belong to it."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    info = project.folder / "site" / "millstream_installed-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: millstream-installed\nVersion: 1.0\n")
    lines = "\n".join(f"{name} = {value}" for name, value in entry.items())
    (info / "entry_points.txt").write_text(f"[pytest11]\n{lines}\n")
    (info / "RECORD").write_text("millstream/__init__.py,,\nmillstream/pytest_plugin.py,,\n")
    project.path.insert(0, str(info.parent))


@pytest.mark.parametrize("how", ["installed", "and named", "and in conftest.py"])
def test_it_may_be_loaded_twice(project: Project, how: str) -> None:
    install(project)
    project.write(
        "test_it.py", APP + "\ndef test_it(serve_local):\n    assert serve_local(Model.bind()).call(1) == 2\n"
    )
    if how == "and in conftest.py":
        project.write("conftest.py", "pytest_plugins = ['millstream.pytest_plugin']")

    session = project.run(*(["-p", "millstream.pytest_plugin"] if how == "and named" else []))

    assert (session.passed, session.failed) == (1, 0), session.output


def test_it_can_be_left_out(project: Project) -> None:
    install(project)
    project.write(
        "test_it.py", "def test_it(request):\n    assert not request.config.pluginmanager.hasplugin('millstream')"
    )

    session = project.run("-p", "no:millstream")

    assert (session.passed, session.failed) == (1, 0), session.output
    assert "serve_local" not in project.run("-p", "no:millstream", "--fixtures").output


def test_it_costs_nothing_until_a_fixture_is_asked_for() -> None:
    script = (
        "import sys, pytest; before = set(sys.modules); import millstream.pytest_entry, millstream.pytest_plugin; "
        "print(sorted(set(sys.modules) - before))"
    )

    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout

    assert printed == "['millstream', 'millstream.pytest_entry', 'millstream.pytest_plugin']\n"


def test_entry_point_leads_to_the_plugin() -> None:
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]

    (plugin,) = importlib.import_module(entry["millstream"]).pytest_plugins
    assert importlib.import_module(plugin).__name__ == "millstream.pytest_plugin"
