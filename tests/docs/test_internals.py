"""docs/internals.md against the state machine and against the code it names."""

import importlib
import re
from pathlib import Path

import pytest

from millstream.broker.states import TERMINAL, TRANSITIONS, State
from tests.docs import pages

# In the words of the comments beside the members, which Python does not keep.
TEXT = (pages.ROOT / "broker" / "states.py").read_text()


def sentence(name: str) -> str:
    """The comment beside `name` in states.py."""
    found = re.search(rf'= "{name}"  # (.*)', TEXT)
    assert found, f"{name} has no sentence"
    return found[1]


def states_table() -> list[str]:
    rows = [f"| `{state}` | {'yes' if state in TERMINAL else ''} | {sentence(state)} |" for state in State]
    return ["| state | terminal | meaning |", "|---|---|---|", *rows]


def transitions_table() -> list[str]:
    rows = [
        f"| {f'`{before}`' if before else '(unknown)'} | `{event}` | `{after}` | {sentence(event)} |"
        for (before, event), after in TRANSITIONS.items()
    ]
    return ["| from | event | to | when |", "|---|---|---|---|", *rows]


@pytest.mark.parametrize(
    "expected", ["\n".join(states_table()), "\n".join(transitions_table())], ids=["states", "events"]
)
def test_tables_are_those_of_the_code(expected: str) -> None:
    assert expected in pages.INTERNALS.read_text(), f"the page should have this table:\n{expected}"


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_places_in_the_code_exist(page: Path) -> None:
    text = page.read_text()
    files = set(
        re.findall(
            r"`((?:broker|handles|replicas|autoscaler|dashboard|millstream|tests|benchmarks|examples)/[\w/.]*)", text
        )
    )
    places = re.findall(r"`(\w[\w/]*)\.py: ([\w.]+)`", text)

    assert [file for file in files if not (pages.ROOT / file).exists()] == []
    assert [f"{file}.py: {name}" for file, name in places if not is_there(file, name)] == []


def is_there(file: str, name: str) -> bool:
    package = file if file.startswith("millstream/") else f"millstream/{file}"
    found = importlib.import_module(package.replace("/", "."))
    for part in name.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and anchor not in map(anchor_of, pages.headings(linked))):
            broken.append(target)

    assert broken == []


def anchor_of(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
