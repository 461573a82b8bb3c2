"""The same faults for millstream and three peers from PyPI, each in a virtual environment of its own.

    make faults-peers      (python -m benchmarks.faults.run [--tasks 60] [--json FILE] [--markdown FILE])

The systems run at the same time, each on a server of its own (AOF on), with two workers of four slots. A worker that
ends is started again after 1 s, as a supervisor would. Each gets tasks of 0.2 s, one of 2 s, and then one every 0.5 s.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.faults.ledger import Line, Verdict, judge, parse
from benchmarks.processes import descendants, send_signal
from benchmarks.virtual import python_of
from tests.servers import Server

ROOT = Path(__file__).parents[2]
WATCH_S = 30.0  # lost means: not completed so long after the fault
GRACE_S = 5.0  # what is sent in the last seconds of the watch would not tell anything
TIMEOUT_S = 10  # the peers' time-outs: five times the longest task
RESTART_S = 1.0


@dataclass(frozen=True, slots=True)
class System:
    name: str
    packages: tuple[str, ...]  # none: this very environment
    workers: tuple[tuple[str, ...], ...]  # arguments of Python


def module(name: str) -> str:
    return f"benchmarks.faults.with_{name}"


def celery_node(name: str) -> tuple[str, ...]:
    return ("-m", "celery", "-A", module("celery"), "worker", "-c", "4", "-n", name, "-l", "WARNING")


SYSTEMS = (
    System(
        "millstream",
        (),
        (("-c", "from millstream.cli import main; main()", "run", f"{module('millstream')}:app"),),
    ),
    System("celery", ("celery==5.7.0", "redis==8.1.0", "packaging==24.2"), (celery_node("a"), celery_node("b"))),
    System(
        "taskiq",
        ("taskiq==0.13.0", "taskiq-redis==1.2.4"),
        (("-m", "taskiq", "worker", f"{module('taskiq')}:broker", "--workers", "2", "--max-async-tasks", "4"),),
    ),
    System("arq", ("arq==0.28.0",), (("-m", "arq", f"{module('arq')}.WorkerSettings"),) * 2),
)


class Run:
    """One system on one server of its own, from its start to its end."""

    def __init__(self, system: System, python: str, folder: Path) -> None:
        self.system, self.python, self.folder = system, python, folder
        self.ledger = folder / "ledger"
        self.ledger.touch()
        self.server = Server("valkey", "--appendonly", "yes", "--appendfsync", "everysec").start()
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("MILLSTREAM_")} | {
            "PYTHONPATH": str(ROOT),
            "FAULTS_LEDGER": str(self.ledger),
            "FAULTS_URL": self.server.url,
            "FAULTS_TIMEOUT_S": str(TIMEOUT_S),
            "MILLSTREAM_URL": self.server.url,
        }
        self.workers = [self._start(arguments) for arguments in system.workers]
        self.sender = self._start(("-m", module(system.name)))
        self._over = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise)
        self._supervisor.start()

    def _start(self, arguments: tuple[str, ...]) -> subprocess.Popen[str]:
        with (self.folder / "log").open("a") as log:
            return subprocess.Popen(
                [self.python, *arguments], cwd=self.folder, env=self.environment, stdin=subprocess.PIPE, text=True,
                stdout=log, stderr=log,
            )  # fmt: skip

    def _supervise(self) -> None:
        while not self._over.wait(0.05):
            for index, worker in enumerate(self.workers):
                if worker.poll() is not None and not self._over.wait(RESTART_S):
                    self.workers[index] = self._start(self.system.workers[index])

    def send(self, name: str, seconds: float) -> None:
        assert self.sender.stdin is not None
        self.sender.stdin.write(f"{name} {seconds}\n")
        self.sender.stdin.flush()

    def lines(self) -> list[Line]:
        return parse(self.ledger.read_text())

    def wait_for(self, condition: Callable[[list[Line]], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition(self.lines()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.system.name}: no {what}; its log ends\n{self._log()}")
            time.sleep(0.02)

    def _log(self) -> str:
        return (self.folder / "log").read_text()[-2000:]

    def warm_up(self) -> None:
        """Until two processes have run something."""
        for turn in range(60):
            for index in range(8):
                self.send(f"warm-{turn}-{index}", 0.2)
            time.sleep(1)
            if len({line.pid for line in self.lines() if line.event == "start"}) >= 2:
                self.wait_for(lambda lines: self._idle(lines), 20, "end of the warm-up")
                return
        raise TimeoutError(f"{self.system.name} runs nothing; its log ends\n{self._log()}")

    @staticmethod
    def _idle(lines: list[Line]) -> bool:
        return sum(line.event == "start" for line in lines) == sum(line.event == "end" for line in lines)

    def kill_workers(self) -> None:
        for pid in [pid for worker in self.workers for pid in (*descendants(worker.pid), worker.pid)]:
            send_signal(pid, signal.SIGKILL)

    def close(self) -> None:
        self._over.set()
        self._supervisor.join()
        self.kill_workers()
        self.sender.kill()
        for process in (*self.workers, self.sender):
            process.wait()
        self.server.stop()


def kill_one(run: Run) -> None:
    pid = next(line.pid for line in run.lines() if line.event == "start" and line.name == "long")
    send_signal(pid, signal.SIGKILL)


def restart_server(run: Run) -> None:
    run.server.end()
    run.server.start()


FAULTS: dict[str, Callable[[Run], None]] = {
    "process killed": kill_one,
    "all workers killed": Run.kill_workers,
    "server restarted": restart_server,
}


def try_one(system: System, python: str, fault: str, tasks: int) -> Verdict:
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        run = Run(system, python, Path(folder))
        try:
            run.warm_up()
            for index in range(tasks):
                run.send("long" if index == 4 else f"task-{index}", 2.0 if index == 4 else 0.2)
            run.wait_for(lambda lines: any((x.event, x.name) == ("start", "long") for x in lines), 20, "start")
            time.sleep(0.3)
            fault_s = time.monotonic()
            FAULTS[fault](run)
            late = 0
            while time.monotonic() < fault_s + WATCH_S:
                if time.monotonic() < fault_s + WATCH_S - GRACE_S:
                    run.send(f"late-{late}", 0.2)
                    late += 1
                time.sleep(0.5)
            return judge(run.lines(), fault_s)
        finally:
            run.close()


def table(results: dict[str, dict[str, Verdict]]) -> str:
    rows = [
        "| Fault | System | Accepted | Not done in 30 s | Done twice | Cut off, begun again | Takeover | All done after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for fault, by_system in results.items():
        for name, v in by_system.items():
            takeover = "-" if v.takeover_median_s is None else f"{v.takeover_median_s} s, {v.takeover_max_s} s"
            done = "-" if v.all_done_s is None else f"{v.all_done_s} s"
            rows.append(
                f"| {fault} | {name} | {v.accepted} | {v.lost} | {v.doubled} "
                f"| {v.interrupted}, {v.taken_over} | {takeover} | {done} |"
            )
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=60)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "millstream-peers")
    options = parser.parse_args()
    pythons = {system.name: python_of(system.name, system.packages, options.cache) for system in SYSTEMS}
    print("; ".join(f"{system.name} {' '.join(system.packages)}".strip() for system in SYSTEMS), file=sys.stderr)
    results: dict[str, dict[str, Verdict]] = {}
    for fault in FAULTS:
        with ThreadPoolExecutor(len(SYSTEMS)) as threads:
            begun = {s.name: threads.submit(try_one, s, pythons[s.name], fault, options.tasks) for s in SYSTEMS}
        results[fault] = {name: future.result() for name, future in begun.items()}
        print(f"{fault}: done", file=sys.stderr)
    print(table(results))
    if options.markdown:
        options.markdown.write_text(table(results))
    if options.json:
        options.json.write_text(json.dumps({f: {n: asdict(v) for n, v in r.items()} for f, r in results.items()}))


if __name__ == "__main__":
    main()
