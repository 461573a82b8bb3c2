"""`millstream run` and its dashboard."""

import socket
import urllib.request

import pytest

from tests.cli.shell import Shell
from tests.servers import free_port

pytestmark = pytest.mark.processes


def test_run_starts_the_dashboard_and_says_where(shell: Shell) -> None:
    port = free_port()
    running = shell.start("run", "hello:app", "--port", str(port)).expect("serving ")

    assert running.lines[1] == f"dashboard  http://127.0.0.1:{port}"
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
        assert answer.status == 200
    assert running.end() == 0
    assert running.lines[3:] == ["ending     replicas finish what they run; .millstream keeps the data"]


def test_run_goes_on_without_a_dashboard_where_its_usual_port_is_taken(shell: Shell) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(("127.0.0.1", 8265))
            other.listen()
        except OSError:
            pass  # taken by somebody else: as good

        running = shell.start("run", "hello:app").expect("serving ")

        assert running.lines[1] == "dashboard  none: port 8265 is taken; choose another with --port"
        assert running.end() == 0
