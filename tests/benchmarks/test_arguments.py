"""What the commands of the benchmarks say to a mistake: one line, at once."""

import sys
from pathlib import Path

import pytest

from benchmarks.peers import run as peers
from benchmarks.suite import run as suite


@pytest.mark.parametrize(
    ("command", "mistake", "answer"),
    [
        (suite, ["--only", "sereal"], "unknown workload 'sereal'; known are submit, "),
        (suite, ["--rounds", "0"], "0 is less than 1"),
        (suite, ["--backlog", "many"], "'many'"),
        (suite, ["--page", "/nowhere.md"], "No such file or directory: '/nowhere.md'"),
        (peers, ["--systems", "floor,selery"], "unknown system 'selery'; known are floor, "),
        (peers, ["--rounds", "-1"], "-1 is less than 1"),
        (peers, ["--page", "PLAIN"], "the page has no lines"),
    ],
)
def test_mistake_is_one_line_before_anything_is_measured(
    command: object,
    mistake: list[str],
    answer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = tmp_path / "plain.md"
    plain.write_text("no markers")
    monkeypatch.setattr(sys, "argv", ["benchmark", *(str(plain) if word == "PLAIN" else word for word in mistake)])

    with pytest.raises(SystemExit) as ended:
        command.main()  # type: ignore[attr-defined]

    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    assert mistake[0] in said and answer in said
