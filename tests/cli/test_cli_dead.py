"""`millstream dead`: what was given up is listed, shown, sent again and dropped."""

import pytest

from tests.cli.shell import Shell

pytestmark = pytest.mark.processes

DEADLY = """
import os
from pathlib import Path

from millstream import serve

@serve.deployment(max_attempts=1)
class Deadly:
    async def __call__(self, name):
        if not Path("mended").exists():
            os._exit(1)
        return f"{name} lives"

@serve.deployment
class Other:
    async def __call__(self):
        return 1

@serve.deployment
class Both:
    def __init__(self, *parts):
        pass

app = Both.bind(Deadly.bind(), Other.bind())
"""


@pytest.fixture
def deadly(shell: Shell) -> Shell:
    shell.write("deadly.py", DEADLY)
    shell.run("deadly:app")
    return shell


def die(shell: Shell, name: str) -> str:
    """A request that kills its replica; its ref id."""
    said = shell.millstream("call", "Deadly", name)
    assert said.code == 1
    return next(word for word in said.complaint.split() if word.startswith("default.Deadly~")).rstrip(":,")


def test_what_has_died_is_listed_shown_and_sent_again(deadly: Shell) -> None:
    assert deadly.millstream("dead", "list").out == "0 dead letters\n"
    ref_id, other = die(deadly, "Ada"), die(deadly, "Bob")

    table, listed = deadly.millstream("dead", "list", "Deadly"), deadly.millstream("dead", "list", "--json").json
    shown = deadly.millstream("dead", "show", ref_id)

    letter = listed["dead_letters"][1]
    assert (listed["total"], listed["dropped"], letter["ref_id"], letter["attempt"]) == (2, 0, ref_id, 1)
    assert ref_id in table.out and "exit" in table.out and table.out.endswith("2 dead letters\n")
    assert deadly.millstream("dead", "list", "--limit", "1").out.endswith("2 dead letters, 1 shown\n")
    assert shown.out.startswith(ref_id) and f"attempt 1 was on replica {letter['history'][0]['replica']}" in shown.out
    assert deadly.millstream("dead", "show", letter["id"]).out == shown.out

    (deadly.folder / "mended").touch()
    assert deadly.millstream("dead", "requeue", ref_id).out == "1 request sent again\n"
    again = deadly.millstream("ref", ref_id, "--wait", "30")
    assert (again.code, "'Ada lives'" in again.out) == (0, True)
    bulk = deadly.millstream("dead", "requeue", "--all", "--deployment", "Deadly", "--json").json
    assert bulk == {"queued": 1, "refused": {}}
    assert "'Bob lives'" in deadly.millstream("ref", other, "--wait", "30").out
    assert deadly.millstream("dead", "list").out == "0 dead letters\n"


def test_what_cannot_be_sent_is_said_and_stays(deadly: Shell) -> None:
    ref_id = die(deadly, "Ada")
    letter = deadly.millstream("dead", "show", ref_id, "--json").json

    drop = deadly.millstream("dead", "drop", "--all", "--yes")
    late = deadly.millstream("dead", "requeue", letter["id"])

    assert drop.out == "1 dead letter dropped\n"
    assert late.code == 1
    assert late.complaint == f"there is no dead letter {letter['id']}; `millstream dead list` has those there are"


def test_mistakes_are_one_line_each(deadly: Shell) -> None:
    for arguments, complaint in (
        (("requeue",), "Which ones? Give IDs (`millstream dead list` has them), or --all."),
        (("drop", "x", "--all"), "IDs, or --all, not both."),
        (("show", "nonsense"), "'nonsense' is not a ref id"),
        (("show", "default.Deadly/1"), "is no id of a dead letter"),
        (("list", "Nope"), "there is no deployment 'Nope'"),
    ):
        said = deadly.millstream("dead", *arguments)
        assert said.code != 0 and complaint in said.complaint, said

    ref_id = die(deadly, "Ada")
    asked = deadly.millstream("dead", "drop", "--all", stdin="n\n")
    assert asked.code == 130 and "Drop all dead letters?" in asked.err
    assert deadly.millstream("dead", "list", "--json").json["dead_letters"][0]["ref_id"] == ref_id
