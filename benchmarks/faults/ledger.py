"""What the task body and the sender write down, and what it says afterwards. Needs nothing but Python: every peer imports it."""

import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

URL = os.environ.get("FAULTS_URL", "")
TIMEOUT_S = int(os.environ.get("FAULTS_TIMEOUT_S", "10"))


def note(event: str, name: str) -> None:
    """Append one line; a line is one write, so that a kill leaves none in part."""
    file = os.open(os.environ["FAULTS_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{event} {name} {os.getpid()} {time.monotonic():.4f}\n".encode())
    os.close(file)


def send_all(submit: Callable[[str, float], object]) -> None:
    """Submit what standard input names. What the system refused is no promise, and does not count as lost."""
    for line in sys.stdin:
        name, seconds = line.split()
        try:
            submit(name, float(seconds))
        except Exception as error:
            print(f"refused {name}: {error!r}", file=sys.stderr, flush=True)
            note("refused", name)
        else:
            note("sent", name)


@dataclass(frozen=True, slots=True)
class Line:
    event: str
    name: str
    pid: int
    at_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    accepted: int
    refused: int
    lost: int  # accepted, and not completed when the watch ended
    doubled: int  # completed more than once
    interrupted: int  # running at the fault, in a process that did not complete them
    taken_over: int  # of these, started again
    takeover_median_s: float | None
    takeover_max_s: float | None
    all_done_s: (
        float | None
    )  # from the fault to the last first completion of what was accepted before it; None: some lost


def parse(text: str) -> list[Line]:
    fields = (line.split() for line in text.splitlines())
    return [Line(event, name, int(pid), float(at)) for event, name, pid, at in fields]


def judge(lines: Iterable[Line], fault_s: float) -> Verdict:
    """What became of everything but the warm-up. `fault_s` is on the clock of the ledger."""
    lines = [line for line in lines if not line.name.startswith("warm")]
    sent = {line.name: line.at_s for line in lines if line.event == "sent"}
    ends = [line for line in lines if line.event == "end"]
    first_end: dict[str, float] = {}
    for line in ends:
        first_end.setdefault(line.name, line.at_s)
    starts = [line for line in lines if line.event == "start"]
    completed = {(line.name, line.pid) for line in ends}
    cut = {line.name for line in starts if line.at_s < fault_s and (line.name, line.pid) not in completed}
    again = [min((s.at_s for s in starts if s.name == name and s.at_s >= fault_s), default=None) for name in cut]
    takeovers = [at - fault_s for at in again if at is not None]
    before = [name for name, at in sent.items() if at < fault_s]
    done = [first_end[name] - fault_s for name in before if name in first_end]
    return Verdict(
        accepted=len(sent),
        refused=sum(line.event == "refused" for line in lines),
        lost=sum(name not in first_end for name in sent),
        doubled=sum(count > 1 for count in Counter(line.name for line in ends).values()),
        interrupted=len(cut),
        taken_over=len(takeovers),
        takeover_median_s=round(statistics.median(takeovers), 2) if takeovers else None,
        takeover_max_s=round(max(takeovers), 2) if takeovers else None,
        all_done_s=round(max(done), 2) if done and len(done) == len(before) else None,
    )
