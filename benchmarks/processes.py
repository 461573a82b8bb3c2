"""What is below a process, and what it has used. Needs nothing but Python and /proc."""

import os
import signal
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    try:
        children = [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except OSError:
        return []
    return children + [below for child in children for below in descendants(child)]


def cpu_us(pid: int) -> float:
    """User and system time of a process and of its children that have ended; 0 if it has ended itself."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / TICKS_PER_S * 1e6


def send_signal(pid: int, what: signal.Signals) -> None:
    """Nothing happens if the process has ended."""
    try:
        os.kill(pid, what)
    except ProcessLookupError:
        return


def kill_all(pid: int) -> None:
    """A process and what is below it."""
    for each in (*descendants(pid), pid):
        send_signal(each, signal.SIGKILL)
