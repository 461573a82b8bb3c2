"""Looking at processes through /proc, and waiting for things that processes do."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path


def parents() -> dict[int, int]:
    """pid -> parent pid, of every process; zombies are left out."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if state != "Z":
                found[int(folder.name)] = int(parent)
    return found


def descendants(pid: int) -> set[int]:
    tree, found = parents(), {pid}
    while more := {child for child, parent in tree.items() if parent in found} - found:
        found |= more
    return found - {pid}


def wait_for_end(pids: Iterable[int], timeout_s: float) -> set[int]:
    """Those that still run after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while (left := set(pids) & parents().keys()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def wait_for(condition: Callable[[], object], timeout_s: float = 30.0, what: str = "") -> None:
    """As tests.helpers.wait_until, for code without a loop."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain for {what or condition}"
        time.sleep(0.005)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def find(of: int, word: str) -> list[int]:
    """Descendants of a process with `word` in their command line."""
    return [pid for pid in descendants(of) if word in command_line(pid)]


def me() -> int:
    return os.getpid()
