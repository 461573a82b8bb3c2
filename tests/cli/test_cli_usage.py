"""Mistakes of the user: one clear line on stderr, the right exit code, no traceback, nothing started."""

import socket
import subprocess
import sys

import pytest

import millstream
from tests.cli.shell import Shell

MISTAKES = {
    "an unknown command": (["frobnicate"], 2, "No such command 'frobnicate'"),
    "an unknown option": (["status", "--colour"], 2, "--colour"),
    "a missing argument": (["call"], 2, "DEPLOYMENT"),
    "a target without an attribute": (["run", "hello"], 2, "write, for example, hello:app"),
    "a file for a module": (["run", "hello.py:app"], 2, "for the file hello.py write hello:app"),
    "a module that is not there": (["run", "nowhere:app"], 1, "there is no module 'nowhere' in"),
    "a submodule that is not there": (["run", "hello.deeper:app"], 1, "there is no module 'hello.deeper'"),
    "an attribute that is not there": (["run", "hello:nothing"], 1, "its applications are app"),
    "a deployment for an application": (["run", "hello:Hello"], 1, "write .bind()"),
    "something else for an application": (["deploy", "hello:asyncio"], 1, "is a module, not an application"),
    "a name with a space": (["run", "hello:app", "--name", "my app"], 1, "application name 'my app'"),
    "no server": (["status"], 1, "no server to talk to: none runs in .millstream"),
    "a server that does not answer": (["status", "--url", "redis://:pw@127.0.0.1:1"], 1, "cannot reach the server"),
    "a server to run on that does not answer": (["run", "hello:app", "--url", "redis://127.0.0.1:1"], 1, "cannot reach"),
    "a server for a launcher that does not answer": (["launcher", "--url", "redis://127.0.0.1:1"], 1, "cannot reach"),
    "a URL of something else": (["status", "--url", "http://x"], 1, "is not a Redis URL"),
    "a namespace with a colon": (["status", "--url", "redis://127.0.0.1:1", "--namespace", "a:b"], 1, "namespace 'a:b'"),
    "no number of replicas": (["scale", "Hello"], 2, "give --replicas"),
    "two numbers of replicas": (["scale", "Hello", "--replicas", "1", "--auto"], 2, "give --replicas"),
    "replicas that are no number": (["scale", "Hello", "--replicas", "many"], 2, "'many' is not a valid integer"),
    "kwargs that are no JSON": (["call", "Hello", "--kwargs", "{a"], 2, "not JSON"),
    "kwargs that are no object": (["call", "Hello", "--kwargs", "[]"], 2, "must be an object"),
    "a node with a colon": (["launcher", "--node", "a:b", "--url", "redis://127.0.0.1:1"], 1, "node name 'a:b'"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line(shell: Shell, mistake: str) -> None:
    arguments, code, line = MISTAKES[mistake]

    said = shell.millstream(*arguments)

    assert (said.code, said.out) == (code, "")
    assert line in said.complaint
    assert "pw" not in said.err


def test_ports_that_are_taken_are_said_before_anything_starts(shell: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = shell.millstream("run", "hello:app", "--port", str(taken.getsockname()[1]))

    assert said.code == 1
    assert "is taken; choose another with --port" in said.complaint
    assert not (shell.folder / ".millstream").exists()


FAILING = {
    "raising": ("def f():\n    return 1 / 0\nx = f()\n", "ZeroDivisionError"),
    "not_python": ("def f(:\n", "SyntaxError"),
    "needing": ("import not_there\n", "ModuleNotFoundError"),
    "leaving": ("raise SystemExit(3)\n", "SystemExit"),
}


@pytest.mark.parametrize("module", FAILING)
def test_module_that_fails_shows_the_users_frames_only(shell: Shell, module: str) -> None:
    source, error = FAILING[module]
    shell.write(f"{module}.py", source)

    said = shell.millstream("run", f"{module}:app")

    *traceback, last = said.err.splitlines()
    assert said.code == 1
    assert last == f"millstream: importing '{module}' raised {error}; see above"
    assert f'File "{shell.folder}/{module}.py"' in "\n".join(traceback)
    assert "importlib" not in said.err and "millstream/cli" not in said.err


@pytest.mark.processes
def test_module_that_serves_when_imported_is_refused(shell: Shell) -> None:
    shell.write("serving.py", "from hello import app\nfrom millstream import serve\nserve.run(app)\n")

    said = shell.millstream("run", "serving:app")

    assert said.code == 1
    assert "put that under `if __name__ == '__main__':`" in said.err.splitlines()[-1]


def test_help_names_every_command_and_needs_nothing_heavy() -> None:
    source = (
        "import sys, millstream.cli as cli\n"
        "sys.argv = ['millstream', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit as e: assert not e.code\n"
        "print(*{'redis', 'rich', 'asyncio', 'anyio', 'cloudpickle', 'starlette'} & sys.modules.keys())\n"
    )

    said = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout

    *_, heavy = said.splitlines()
    assert heavy == ""
    for command in ("run", "deploy", "status", "scale", "call", "ref", "doctor", "launcher", "dashboard", "shutdown"):
        assert f"\n  {command} " in said


def test_version(shell: Shell) -> None:
    assert (
        shell.millstream("version").out == shell.millstream("--version").out == f"millstream {millstream.__version__}\n"
    )


def test_secret_is_not_an_option(shell: Shell) -> None:
    for command in ("run", "deploy", "launcher", "call"):
        assert "secret" not in shell.millstream(command, "--help").out.lower()
