"""millstream's own benchmarks: what it does on this machine, and what the floor does beside it.

    make bench      (python -m benchmarks.suite [--only submit,serial] [--rounds 3] [--seconds 1] [--aof]
                     [--json FILE] [--plot FILE] [--page docs/performance.md])

Each workload has a client process of its own, which starts millstream as a user would and ends it; round by round, so
that a bad minute of the machine hits all. Figures are medians over the rounds, with minimum and maximum. A workload
that fails is left out, and says so.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.arguments import at_least_one, check_page, told
from benchmarks.peers.report import short, with_section
from benchmarks.peers.run import ROOT, environment, parse, seen_from
from benchmarks.processes import kill_all
from benchmarks.suite import tables
from benchmarks.suite.how import How
from benchmarks.suite.workloads import WORKLOADS, Workload, chosen

END_S = 30.0  # for what was interrupted, to end its processes


def measure(workload: Workload, how: How) -> tuple[dict[str, float], str]:
    """One workload from its start to its end: its figures by name, and what went wrong, if anything did."""
    # All it leaves behind, of servers that had to be killed too, goes with the folder.
    with (
        tempfile.TemporaryDirectory(prefix="suite-", ignore_cleanup_errors=True) as folder,
        open(f"{folder}/log", "w+") as log,
    ):
        client = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.suite.one", workload.name, json.dumps(asdict(how))],
            cwd=folder,
            env={k: v for k, v in os.environ.items() if not k.startswith("MILLSTREAM_")}
            | {"PYTHONPATH": str(ROOT), "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # a Ctrl-C is for us, who pass it on
        )
        try:
            output, _ = client.communicate(timeout=workload.limit_s)
        except subprocess.TimeoutExpired:
            kill_all(client.pid)
            output, _ = client.communicate()
            return parse(output), f"it took more than {workload.limit_s:.0f} s"
        except BaseException:
            _interrupt(client)
            raise
        log.seek(0)
        said = log.read()[-3000:]
    return parse(output), f"it ended with {client.returncode}\n{said}" if client.returncode else ""


def _interrupt(client: "subprocess.Popen[str]") -> None:
    client.send_signal(signal.SIGINT)
    try:
        client.communicate(timeout=END_S)
    except BaseException:
        kill_all(client.pid)
        client.communicate()


def rounds_of(workloads: list[Workload], how: How, number: int) -> tuple[tables.Rounds, list[str]]:
    """The figures of each round, and a note for each workload that failed."""
    rounds: tables.Rounds = [{} for _ in range(number)]
    notes: dict[str, None] = {}
    for count, figures in enumerate(rounds, 1):
        for workload in workloads:
            found, trouble = measure(workload, how)
            figures |= found
            print(f"round {count} of {number}: {workload.name}: {in_words(found)}", file=sys.stderr, flush=True)
            if trouble:
                print(f"{workload.name} failed: {trouble}", file=sys.stderr, flush=True)
                notes[f"{workload.name}, or a part of it, in round {count}: {trouble.splitlines()[0]}"] = None
    return rounds, list(notes)


def in_words(figures: dict[str, float]) -> str:
    return "; ".join(f"{name} {short(value)}" for name, value in figures.items()) or "nothing"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", type=told(chosen), default="", help="some of " + ",".join(workload.name for workload in WORKLOADS)
    )
    parser.add_argument("--rounds", type=at_least_one, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="about what one figure is to take")
    parser.add_argument(
        "--aof", action="store_true", help="a durable server (AOF everysec), as `millstream run` has it"
    )
    parser.add_argument("--deployments", type=at_least_one, default=1_000, help="of many_deployments")
    parser.add_argument("--backlog", type=at_least_one, default=1_000_000, help="requests that wait in backlog")
    parser.add_argument("--idle-seconds", type=float, default=20.0, help="how long idle looks on")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--page", type=Path, help="write the tables into this page, between its two markers")
    options = parser.parse_args()
    if options.page:
        check_page(parser, options.page, *tables.markers(aof=options.aof))
    return options


def main() -> None:
    options = arguments()
    workloads = options.only
    how = How(options.seconds, options.aof, options.deployments, options.backlog, options.idle_seconds)
    about = environment([], aof=options.aof)
    try:
        rounds, notes = rounds_of(workloads, how, options.rounds)
    except KeyboardInterrupt:
        print("interrupted; nothing is written", file=sys.stderr)
        sys.exit(130)
    print(tables.section(rounds, workloads, about, notes))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"environment": about, "how": asdict(how), "left out": notes, "rounds": rounds}, indent=1)
        )
    if options.plot:
        facts = ", ".join(f"{name} {value}" for name, value in about.items() if name != "and")
        tables.plot(rounds, f"one client, one replica, medians of {options.rounds} rounds ({facts})", options.plot)
    if options.page:
        text = tables.section(rounds, workloads, about, notes)
        write_page(options.page, text, options.plot, options.json, aof=options.aof)


def write_page(page: Path, text: str, plot: Path | None, rounds: Path | None, *, aof: bool = False) -> None:
    """The text between the page's markers, with the plot above it and a link to the rounds below, if there are any."""
    if plot:
        text = f"![Requests per second, and serial latency]({seen_from(page, plot)})\n\n{text}"
    if rounds:
        text += f"\nAll rounds are in [{rounds.name}]({seen_from(page, rounds)}).\n"
    page.write_text(with_section(page.read_text(), text, *tables.markers(aof=aof)))
