"""Looking and changing, while `millstream run` serves: status, scale, call, ref, delete, shutdown."""

import pytest

from tests.cli.shell import HELLO, Shell
from tests.scenarios.processes import wait_for

pytestmark = pytest.mark.processes

TWO = (
    HELLO
    + """
@serve.deployment(autoscaling_config={"min_replicas": 1, "max_replicas": 3})
class Elastic:
    async def __call__(self):
        return 1

both = Elastic.bind()
"""
)
UNKNOWN = "default.Hello~" + "0" * 22


def ref_of(shell: Shell, *call: str) -> str:
    """Send a request that will not end soon; its ref id."""
    return shell.millstream("call", *call, "--timeout", "0.2").complaint.split()[1]


# status


def test_status_is_a_table_for_people_and_json_for_programs(serving: Shell) -> None:
    table, status = serving.millstream("status"), serving.millstream("status", "--json").json

    hello = status["applications"]["default"]["deployments"]["Hello"]
    (replica,) = hello["replicas"]
    (node,) = status["nodes"]
    assert status["applications"]["default"]["status"] == "RUNNING"
    assert (hello["status"], hello["target_replicas"], hello["waiting"]) == ("HEALTHY", 1, 0)
    assert replica["node"] == node and replica["pid"] in serving.processes()
    assert status["missing"] == [] == table.err.splitlines()
    row = next(line for line in table.out.splitlines() if line.startswith(" default.Hello   HEALTHY"))
    assert row.split()[2:7] == ["1/1", "0", "0", "0", "0"]
    assert replica["replica_id"] in table.out and f"nodes: {node}" in table.out
    assert "\x1b" not in table.out


# call


@pytest.mark.parametrize(
    ("arguments", "out"),
    [
        (["Hello", "Ada"], "hello Ada\n"),
        (["default.Hello", '"3"'], "hello 3\n"),
        (["Hello", "--", "-x"], "hello -x\n"),
        (["Hello", "2", "--method", "add", "--kwargs", '{"b": 3}'], "{'sum': 5}\n"),
        (["Hello", "[1, 2]", "[3]", "--method", "add", "--json"], '{\n  "sum": [\n    1,\n    2,\n    3\n  ]\n}\n'),
    ],
)
def test_arguments_are_json_or_else_strings(serving: Shell, arguments: list[str], out: str) -> None:
    said = serving.millstream("call", *arguments)

    assert (said.code, said.out, said.err) == (0, out, "")


def test_remote_error_is_the_remote_traceback_and_one_line(serving: Shell) -> None:
    said = serving.millstream("call", "Hello", "--method", "boom")

    *traceback, last = said.err.splitlines()
    assert (said.code, said.out) == (1, "")
    assert traceback[0] == "Traceback (most recent call last):" and 'hello.py", line' in traceback[1]
    assert last.startswith("millstream: request default.Hello~") and last.endswith("raised ValueError: out of cheese")


@pytest.mark.parametrize("command", [["call", "Nope"], ["scale", "other.Hello", "--auto"]])
def test_unknown_deployment_lists_those_there_are(serving: Shell, command: list[str]) -> None:
    said = serving.millstream(*command)

    assert said.code == 1
    assert said.complaint == f"there is no deployment '{command[1]}'; deployed are default.Hello"


def test_unknown_method_lists_those_there_are(serving: Shell) -> None:
    said = serving.millstream("call", "Hello", "--method", "bye")

    assert said.code == 1
    assert "has no method 'bye'; available methods: __call__, add, boom, hold" in said.complaint


# ref


def test_ref_of_a_running_request_names_its_replica(serving: Shell) -> None:
    ref = ref_of(serving, "Hello", "--method", "hold")

    view, words = serving.millstream("ref", ref, "--json").json, serving.millstream("ref", ref)
    waited = serving.millstream("ref", ref, "--wait", "0.1")

    replicas = serving.millstream("status", "--json").json["applications"]["default"]["deployments"]["Hello"][
        "replicas"
    ]
    assert (view["state"], view["method"], view["lane"], view["attempt"]) == ("running", "hold", "normal", 1)
    assert view["replica"] == replicas[0]["replica_id"] and view["since_s"] > 0
    assert words.code == 0 and words.out.startswith(f"{ref}: running on replica {view['replica']} for ")
    assert waited.code == 1 and ": running on" in waited.out


def test_ref_of_a_failed_request_shows_its_error(serving: Shell) -> None:
    ref = serving.millstream("call", "Hello", "--method", "boom").err.splitlines()[-1].split()[2]

    said, waited = serving.millstream("ref", ref), serving.millstream("ref", ref, "--wait", "1")

    assert said.code == 0 and f"{ref}: failed" in said.out and "ValueError: out of cheese" in said.out
    assert waited.code == 1


def test_ref_that_nobody_knows_and_text_that_is_no_ref(serving: Shell) -> None:
    unknown, nonsense = serving.millstream("ref", UNKNOWN), serving.millstream("ref", "hello")

    assert unknown.code == nonsense.code == 1
    assert unknown.out == f"{UNKNOWN}: unknown: it has expired, or never existed on this server\n"
    assert serving.millstream("ref", UNKNOWN, "--json").json == {"ref_id": UNKNOWN, "state": "unknown"}
    assert "is not a ref id" in nonsense.complaint


# doctor


def test_doctor_finds_nothing_wrong(serving: Shell) -> None:
    said, findings = serving.millstream("doctor"), serving.millstream("doctor", "--json").json

    assert said.code == 0
    assert all(line.startswith(("✔ ", "! ")) for line in said.out.splitlines())
    assert {f["check"]: f["verdict"] for f in findings if f["check"] != "latency"} == dict.fromkeys(
        [
            "server",
            "eviction",
            "memory",
            "persistence",
            "clock",
            "secret",
            "launchers",
            "autoscaler",
            "deployments",
            "keys",
        ],
        "good",
    )


# what changes things has a run of its own


def test_scale(shell: Shell) -> None:
    shell.write("hello.py", TWO)
    shell.run("hello:both")

    fixed = shell.millstream("scale", "Elastic", "--replicas", "2", "--json").json
    wait_for(lambda: replicas(shell) == 2, 30.0, "two replicas")
    bounds = shell.millstream("scale", "default.Elastic", "--max", "1")
    wait_for(lambda: replicas(shell) == 1, 30.0, "the new limit")  # at once: downscale_delay_s is for decisions
    least = shell.millstream("scale", "Elastic", "--min", "1", "--json").json
    nonsense = shell.millstream("scale", "Elastic", "--min", "5")
    negative = shell.millstream("scale", "Elastic", "--replicas", "-1")
    auto = shell.millstream("scale", "Elastic", "--auto")

    assert fixed["override"] == {"num_replicas": 2}
    assert bounds.out.startswith("default.Elastic: 1 to 1 replicas from now on")
    assert least["override"] == {"min_replicas": 1, "max_replicas": 1}
    assert nonsense.code == negative.code == 1
    assert nonsense.complaint == "max_replicas=1 is below min_replicas=5"
    assert negative.complaint == "num_replicas=-1 must be at least 0"
    assert auto.out.startswith("default.Elastic: 1 to 3 replicas, as configured")


def test_bounds_for_a_fixed_number_are_refused(serving: Shell) -> None:
    said = serving.millstream("scale", "Hello", "--max", "4")

    assert said.code == 1
    assert "default.Hello has a fixed number of replicas: use --replicas" in said.complaint


def test_ambiguous_names_delete_and_shutdown(shell: Shell) -> None:
    shell.run()
    assert shell.millstream("deploy", "hello:app", "--name", "second").out == "serving    second.Hello (1 replica)\n"

    ambiguous = shell.millstream("call", "Hello")
    deleted = shell.millstream("delete", "second")
    again = shell.millstream("delete", "second")
    declined = shell.millstream("shutdown", stdin="n\n")
    unanswered = shell.millstream("shutdown")
    confirmed = shell.millstream("shutdown", "--yes", "--json").json
    after = shell.millstream("status")

    assert ambiguous.complaint == "'Hello' is in several applications: say default.Hello or second.Hello"
    assert deleted.out.startswith("deleted second in ")
    assert again.code == 1 and again.complaint == "there is no application 'second'; deployed are default"
    assert declined.code == unanswered.code == 1
    assert "Delete default? [y/N]" in declined.err and "nothing was deleted; give --yes" in declined.err
    assert confirmed["deleted"] == ["default"] and confirmed["autoscaler"] and len(confirmed["nodes"]) == 1
    assert after.out.startswith("nothing is deployed\n")


def replicas(shell: Shell) -> int:
    status = shell.millstream("status", "--json").json
    return int(status["applications"]["default"]["deployments"]["Elastic"]["replica_states"].get("RUNNING", 0))
