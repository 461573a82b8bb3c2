"""Who is who among the processes below this one, and what each has used. What is read from /proc stays in here."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from benchmarks.processes import cpu_us, descendants, send_signal
from millstream import serve
from millstream.broker.registry import Registry
from millstream.runtime import with_registry

PATIENCE_S = 60.0
OURS = ("launcher", "autoscaler", "warm", "replica")  # with nothing to do they cost nothing: the bar of `idle`


def party_of(title: str) -> str:
    """What a process is, by its command line; "other" if it is none of ours."""
    for sign, party in (
        ("millstream: launcher", "launcher"),
        ("millstream: autoscaler", "autoscaler"),
        ("millstream: warm", "warm"),
        ("millstream.replicas.warm", "warm"),  # a spare one
    ):
        if sign in title:
            return party
    return "replica" if title.startswith("millstream: ") else "other"


def parties() -> dict[str, list[int]]:
    """The processes that this one has started, by what they are, and the server."""
    found: dict[str, list[int]] = {party: [] for party in OURS} | {"server": [server_pid()]}
    for pid in descendants(os.getpid()):
        if (party := party_of(_title(pid))) in OURS:
            found[party].append(pid)
    return found


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@cache
def server_pid() -> int:
    async def read(registry: Registry) -> int:
        return int((await registry.client.info("server"))["process_id"])

    return with_registry(read)


def replicas(deployment: str = "NoOp", app: str = "default") -> list[int]:
    """The processes of a deployment that serve."""
    return [r.pid for r in serve.status().applications[app].deployments[deployment].replicas if r.state == "RUNNING"]


@contextmanager
def frozen(pids: Iterable[int]) -> Iterator[None]:
    """Meanwhile they take nothing. Not for half a minute: a launcher kills what does not answer."""
    pids = list(pids)
    for pid in pids:
        send_signal(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            send_signal(pid, signal.SIGCONT)


class Meter:
    """CPU time since it was made, in µs, of parties whose processes are given."""

    def __init__(self, **pids: list[int]) -> None:
        self._pids = pids
        self._then = self._read()

    def _read(self) -> dict[str, float]:
        return {party: sum(map(cpu_us, pids)) for party, pids in self._pids.items()}

    def used_us(self) -> dict[str, float]:
        return {party: now - self._then[party] for party, now in self._read().items()}


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    """TimeoutError if it does not come about."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_S:.0f} s until {what}")
        time.sleep(0.05)


def memory_mib(pid: int) -> dict[str, float]:
    """`pss`, where a page that n processes share counts for 1/n of it, `rss`, where it counts whole, and `private`."""
    names = {"Pss": "pss", "Rss": "rss", "Private_Clean": "private", "Private_Dirty": "private"}
    found = dict.fromkeys(names.values(), 0.0)
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        if name in names:
            found[names[name]] += int(rest.split()[0]) / 1024
    return found
