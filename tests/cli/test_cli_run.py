"""`millstream run`: everything in one terminal, the data kept, and nothing left when it ends, however it ends."""

import json
import os
import signal

import pytest

from tests.cli.shell import HELLO, Shell
from tests.scenarios.processes import command_line, wait_for

pytestmark = pytest.mark.processes


def test_run_says_where_things_are_and_streams_what_replicas_print(shell: Shell) -> None:
    running = shell.run()

    said = shell.millstream("call", "Hello", "Ada")

    assert (said.code, said.out, said.err) == (0, "hello Ada\n", "")
    running.expect("greeting Ada")
    server, serving, greeting = running.lines
    assert server.startswith("server     redis://127.0.0.1:") and server.endswith(", data in .millstream")
    assert serving == "serving    default.Hello (1 replica); Ctrl-C ends it"
    assert greeting.startswith("[default.Hello r-") and greeting.endswith("] greeting Ada")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_being_told_to_end_ends_everything_in_order(shell: Shell, number: signal.Signals) -> None:
    running = shell.run()
    assert len(shell.processes()) >= 7  # run, guard, server, launcher, autoscaler, warm parent, replica

    code = running.end(number)

    assert code == 0
    assert shell.processes() == set()
    assert running.lines[-1] == "ending     replicas finish what they run; .millstream keeps the data"
    assert "no server to talk to" in shell.millstream("status").complaint


def test_second_ctrl_c_leaves_at_once_and_the_rest_ends_by_itself(shell: Shell) -> None:
    shell.write("hello.py", HELLO.replace("timeout_s=0.5", "timeout_s=3"))
    running = shell.run()
    shell.millstream("call", "Hello", "--method", "hold", "--timeout", "0.5")

    running.send(signal.SIGINT).expect("ending ")
    code = running.end(signal.SIGINT)

    assert code == 130
    assert running.lines[-1] == "millstream: left at once; what is still running ends by itself"
    assert shell.processes() != set()
    wait_for(lambda: not shell.processes(), 30.0, "the end of all")


def test_namespaces_are_apart(shell: Shell) -> None:
    shell.run("hello:app", "--namespace", "mine")

    assert shell.millstream("call", "Hello", "--namespace", "mine").out == "hello you\n"
    assert shell.millstream("status").out == "nothing is deployed\n"


def test_being_killed_leaves_nothing_and_the_next_run_waits_for_that(shell: Shell) -> None:
    first = shell.run()
    started = shell.processes()

    first.end(signal.SIGKILL)
    second = shell.run()

    assert started & shell.processes() == set()
    assert second.end() == 0
    wait_for(lambda: not shell.processes(), 30.0, "the end of all")


def test_queued_requests_and_operators_words_survive_in_the_state_folder(shell: Shell) -> None:
    first = shell.run()
    assert shell.millstream("scale", "Hello", "--replicas", "0").code == 0
    wait_for(lambda: replicas_of(shell) == 0, 30.0, "the replica's end")
    late = shell.millstream("call", "Hello", "later", "--timeout", "0.2")
    ref = late.complaint.split()[1]
    first.end()

    second = shell.run()
    state = shell.millstream("ref", ref, "--json").json["state"]
    shell.millstream("scale", "Hello", "--auto")
    ended = shell.millstream("ref", ref, "--wait", "20", "--json")

    assert second.lines[1].endswith("default.Hello (0 replicas), with 1 request from before; Ctrl-C ends it")
    assert late.code == 1 and state == "queued"
    assert (ended.json["state"], ended.json["value"]) == ("succeeded", "'hello later'")


def test_run_again_replaces_the_application(shell: Shell) -> None:
    shell.run().end()
    shell.write("hello.py", HELLO.replace("hello {name}", "good day {name}"))

    shell.run()

    assert shell.millstream("call", "Hello", "Ada").out == "good day Ada\n"


def test_address_of_a_server_that_has_died_is_in_nobodys_way(shell: Shell) -> None:
    shell.run().end()
    advert = {"url": "redis://:gone@127.0.0.1:1/0", "secret_key": "ab" * 32}
    (shell.folder / ".millstream" / "server.json").write_text(json.dumps(advert))

    before = shell.millstream("status")
    shell.run()
    after = shell.millstream("status")

    assert "does not run any more; start it again with `millstream run" in before.complaint
    assert after.code == 0


def test_second_run_joins_and_leaves_and_ends_with_the_first(shell: Shell) -> None:
    first = shell.run()
    server = first.lines[0].split()[1].rstrip(",")

    second = shell.run("hello:app", "--name", "second")
    assert f"server     {server}, joined the one in .millstream" in second.lines
    assert second.end() == 0
    assert second.lines[-1] == "leaving    what is deployed goes on being served"
    assert shell.millstream("call", "second.Hello").out == "hello you\n"

    third = shell.run("hello:app", "--name", "third")
    first.end()
    assert third.wait() == 1
    assert third.lines[-1] == "millstream: the server has ended with the `millstream run` that started it"


def test_state_folder_may_be_elsewhere(shell: Shell) -> None:
    running = shell.run("hello:app", "--state", "kept/here")

    said = shell.millstream("call", "Hello", "--state", "kept/here")

    assert said.out == "hello you\n", said
    assert shell.millstream("status").code == 1
    assert ", data in kept/here" in running.lines[0]
    assert (shell.folder / "kept" / "here" / "secret").stat().st_mode & 0o777 == 0o600


def test_deployment_that_cannot_start_ends_the_run_with_its_traceback_and_one_line(shell: Shell) -> None:
    shell.write("bad.py", HELLO.replace("    async def add", "    def __init__(self):\n        raise ValueError('no weights')\n\n    async def add"))  # fmt: skip

    running = shell.start("run", "bad:app", "--no-dashboard")

    assert running.wait() == 1
    assert running.lines[-1].startswith("millstream: deployment default.Hello cannot start: its constructor raised")
    assert "ValueError: no weights" in running.output and 'bad.py"' in running.output
    assert shell.processes() == set()


def test_server_that_dies_ends_the_run_with_one_line(shell: Shell) -> None:
    running = shell.run()

    (server,) = [pid for pid in shell.processes() if "valkey-server 127.0.0.1:" in command_line(pid)]
    os.kill(server, signal.SIGKILL)

    assert running.wait() == 1
    assert running.lines[-1] == "millstream: the server has ended by itself; .millstream/server.log may say why"


def test_environment_names_another_server(shell: Shell) -> None:
    shell.run()
    folder = shell.folder / "other"
    folder.mkdir()
    url = json.loads((shell.folder / ".millstream" / "server.json").read_text())

    other = Shell(folder, MILLSTREAM_URL=url["url"], MILLSTREAM_SECRET_KEY=url["secret_key"])
    other.write("hello.py", HELLO)
    running = other.run("hello:app", "--name", "other")

    assert shell.millstream("call", "other.Hello").out == "hello you\n"
    assert url["url"].split("@")[1] in running.lines[0] and url["secret_key"] not in running.output
    assert running.end() == 0
    assert not (folder / ".millstream").exists()


def replicas_of(shell: Shell) -> int:
    status = shell.millstream("status", "--json").json
    return len(status["applications"]["default"]["deployments"]["Hello"]["replicas"])
