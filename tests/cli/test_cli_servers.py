"""On a server of one's own: deploy, launcher, autoscaler, dashboard, the secret, and what doctor says of a bad one."""

import signal
import subprocess
import urllib.request

import pytest

from tests.cli.shell import Shell
from tests.scenarios.processes import command_line
from tests.servers import Server, free_port

pytestmark = pytest.mark.processes

SECRET = "a secret for tests"


@pytest.fixture
def there(shell: Shell, valkey: Server) -> Shell:
    """A shell whose environment names the server and the secret."""
    shell.environment |= {"MILLSTREAM_URL": valkey.url, "MILLSTREAM_SECRET_KEY": SECRET}
    return shell


def test_deploy_waits_for_who_is_missing_and_says_how_to_start_it(there: Shell) -> None:
    deploying = there.start("deploy", "hello:app")
    deploying.expect("no launcher runs on this server: start one with `millstream launcher`; waiting for that")
    deploying.expect("no autoscaler runs on this server: start one with `millstream autoscaler`; waiting for that")

    autoscaler = there.start("autoscaler").expect("autoscaler works for redis://127.0.0.1:")
    launcher = there.start("launcher", "--node", "mill-1").expect("launcher mill-1 works for")

    assert deploying.wait() == 0
    assert deploying.lines[-1] == "serving    default.Hello (1 replica)"
    assert there.millstream("call", "Hello").out == "hello you\n"
    assert command_line(launcher.process.pid).strip() == "millstream: launcher mill-1"
    assert command_line(autoscaler.process.pid).strip() == "millstream: autoscaler"
    assert launcher.end(signal.SIGTERM) == autoscaler.end(signal.SIGTERM) == 0
    assert there.processes() == set()


def test_deploy_gives_up_when_told_and_what_it_stored_comes_up_later(there: Shell) -> None:
    there.start("autoscaler").expect("works for")

    said = there.millstream("deploy", "hello:app", "--timeout", "0.5")
    there.start("launcher").expect("works for")

    assert said.code == 1
    assert said.err.splitlines()[-1].startswith("millstream: application 'default' did not come up within 0.5 s")
    assert there.millstream("call", "Hello", "--timeout", "20").out == "hello you\n"


def test_a_nodes_name_is_taken_once(there: Shell) -> None:
    there.start("launcher", "--node", "mill-1").expect("works for")

    said = there.millstream("launcher", "--node", "mill-1")

    assert said.code == 1
    assert "node 'mill-1' has a launcher already (pid " in said.complaint


@pytest.mark.parametrize("command", ["launcher", "autoscaler", "dashboard"])
def test_owned_process_is_silent_and_ends_with_its_owner(there: Shell, command: str) -> None:
    arguments = ("--port", "0") if command == "dashboard" else ()
    running = there.start(command, *arguments, "--owned", stdin=subprocess.PIPE)
    assert running.process.stdin is not None

    running.process.stdin.close()

    assert running.wait() == 0
    assert running.output == ""


def test_dashboard_answers_until_it_is_told_to_end(there: Shell) -> None:
    port = free_port()
    running = there.start("dashboard", "--port", str(port)).expect(f"the dashboard is at http://127.0.0.1:{port}/")

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
        assert answer.status == 200
    taken = there.millstream("dashboard", "--port", str(port))

    assert taken.code == 1 and f"cannot listen on 127.0.0.1:{port}" in taken.err.splitlines()[-1]
    assert running.end(signal.SIGTERM) == 0


def test_wrong_secret_is_one_line(there: Shell) -> None:
    there.start("autoscaler").expect("works for")
    there.environment["MILLSTREAM_SECRET_KEY"] = "another"

    for command in (["status"], ["launcher"], ["run", "hello:app"], ["call", "Hello"]):
        said = there.millstream(*command)
        assert said.code == 1
        assert "is used with another secret; set MILLSTREAM_SECRET_KEY" in said.complaint
    assert "✘ secret" in there.millstream("doctor").out


def test_looking_at_a_namespace_does_not_claim_it_for_a_secret(there: Shell, valkey: Server) -> None:
    for command in (["status"], ["doctor"], ["shutdown", "--yes"], ["scale", "Hello", "--auto"]):
        there.millstream(*command)

    with valkey.connect_blocking() as client:
        assert client.dbsize() == 0


def test_missing_secret_is_said_loudly_and_refused_when_strict(there: Shell) -> None:
    del there.environment["MILLSTREAM_SECRET_KEY"]

    there.start("autoscaler").expect("no secret is set, so whoever can write to this server can run code")
    assert "! secret       none is set" in there.millstream("doctor").out
    there.environment["MILLSTREAM_STRICT"] = "1"
    assert "no secret is set" in there.millstream("status").complaint


# doctor


def test_doctor_on_a_server_that_evicts(there: Shell, valkey: Server) -> None:
    with valkey.connect_blocking() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")

    said = there.millstream("doctor")

    assert said.code == 1
    assert "✘ eviction     maxmemory-policy is allkeys-lru: a full server would throw requests away" in said.out
    assert "! persistence  no append-only file: a crash of the server loses everything" in said.out
    assert "! launchers    none is alive" in said.out and "! autoscaler   none is alive" in said.out
    assert "✔ server       Valkey 9." in said.out


def test_doctor_on_a_server_that_is_not_there(there: Shell, valkey: Server) -> None:
    valkey.kill()

    said = there.millstream("doctor")

    assert said.code == 1
    assert said.out.startswith("✘ server       cannot reach the server at redis://127.0.0.1:")
    assert said.out.count("\n") == 1 and said.err == ""


def test_doctor_names_deployments_that_nobody_serves(there: Shell) -> None:
    there.millstream("deploy", "hello:app", "--timeout", "0.1")

    said = there.millstream("doctor")

    assert said.code == 1
    assert "✘ launchers    none is alive, so no replica can start" in said.out
    assert "✘ deployments  default.Hello has no replica" in said.out


def test_command_that_the_server_forbids_is_one_line(there: Shell, valkey: Server) -> None:
    with valkey.connect_blocking() as client:
        client.execute_command("ACL", "SETUSER", "reader", "on", ">pw", "~ms:*", "+ping", "+get", "+client")
    url = valkey.url.replace("redis://", "redis://reader:pw@")

    status, doctor = there.millstream("status", "--url", url), there.millstream("doctor", "--url", url)

    assert status.code == doctor.code == 1
    assert status.complaint.startswith("the server's user may not do that: NOPERM ")
    assert doctor.err == "" and "✘" in doctor.out
    assert "pw" not in status.err + doctor.out
