"""The ledger of chaos: whole lines, from several processes, also where one is killed."""

import os
import signal
from pathlib import Path

from chaos.ledger import Ledger, read


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.note("submit", "c0-1", "c0/0", "slow")
    ledger.note_all([("end", "c0-1", "ok", "r.1"), ("leave", "c0/0", 7, "-")])

    lines, _ = read(tmp_path / "ledger")

    assert [(line.event, line.who, line.what, line.more) for line in lines] == [
        ("submit", "c0-1", "c0/0", "slow"),
        ("end", "c0-1", "ok", "r.1"),
        ("leave", "c0/0", "7", "-"),
    ]
    assert lines[0].at_s <= lines[1].at_s == lines[2].at_s


def test_reading_goes_on_behind_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    assert read(path) == ([], 0)
    path.write_text("up 1.0 r-1 7 -\nup 2.0 r-2")

    lines, end = read(path)
    with path.open("a") as file:
        file.write(" 8 -\n")
    more, _ = read(path, end)

    assert [line.who for line in lines + more] == ["r-1", "r-2"]


def test_what_was_noted_before_a_kill_is_there(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        ledger = Ledger(tmp_path / "ledger")
        for n in range(1000):
            ledger.note("start", str(n), os.getpid(), "-")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)

    lines, _ = read(tmp_path / "ledger")

    assert [line.who for line in lines] == [str(n) for n in range(1000)]
