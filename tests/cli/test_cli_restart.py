"""`millstream run` is killed with all that it has started, and begins again at once on the server that lives on."""

import os
import signal

import pytest

from tests.cli.shell import Shell
from tests.scenarios.processes import wait_for_end
from tests.servers import Server

pytestmark = pytest.mark.processes


def test_run_that_was_killed_with_everything_serves_again_though_leases_still_speak_for_the_dead(
    shell: Shell, valkey: Server
) -> None:
    shell.environment |= {"MILLSTREAM_URL": valkey.url, "MILLSTREAM_SECRET_KEY": "a secret for tests"}
    first = shell.run()
    assert shell.millstream("call", "Hello", "Ada").out == "hello Ada\n"

    dead = shell.processes()
    for pid in dead:
        os.kill(pid, signal.SIGKILL)
    first.wait()
    wait_for_end(dead, 10.0)
    with valkey.connect_blocking() as client:
        assert client.exists("{ms:leader}:lease")
    shell.run()

    assert shell.millstream("call", "Hello", "Bob", "--timeout", "30").out == "hello Bob\n"
