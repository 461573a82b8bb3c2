"""millstream and other queues side by side: each with one client process and one worker process, on the same server.

    make bench-peers      (python -m benchmarks.peers [--systems floor,millstream,saq] [--rounds 3] [--aof]
                           [--json FILE] [--plot FILE] [--page docs/benchmarks.md])

One system at a time, each on a new server; round by round, so that a bad minute of the machine hits all. A peer's packages
come from PyPI, into a virtual environment of its own. What a system cannot do is "-".
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from benchmarks.arguments import at_least_one, check_page, told
from benchmarks.peers import report
from benchmarks.peers.systems import SYSTEMS, System, module
from benchmarks.processes import kill_all
from benchmarks.virtual import python_of
from tests.servers import Server

ROOT = Path(__file__).parents[2]
CACHE = Path.home() / ".cache" / "millstream-peers"
LIMIT_S = 120.0  # of one system's round; what it has not measured by then is left out


def chosen(names: str) -> list[System]:
    """The systems of these names, with commas; all if there are none. Raises ValueError for one that is unknown."""
    known = {system.name: system for system in SYSTEMS}
    if unknown := [name for name in names.split(",") if name and name not in known]:
        raise ValueError(f"unknown system {unknown[0]!r}; known are {', '.join(known)}")
    return [known[name] for name in names.split(",") if name] or list(SYSTEMS)


def round_of(system: System, python: str, *, seconds: float = 1.0, aof: bool = False) -> dict[str, float]:
    """One system from its start to its end, on a new server: its figures by name."""
    durability = ("--appendonly", "yes", "--appendfsync", "everysec") if aof else ()
    server = Server("valkey", *durability).start()
    try:
        with tempfile.TemporaryDirectory(prefix="peers-") as folder:
            return _measure(system, python, server, Path(folder), seconds)
    finally:
        server.stop()


def _measure(system: System, python: str, server: Server, folder: Path, seconds: float) -> dict[str, float]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MILLSTREAM_")} | {
        "PYTHONPATH": str(ROOT),
        "PEERS_URL": server.url,
        "PEERS_SECONDS": str(seconds),
        "MILLSTREAM_URL": server.url,
    }
    log = folder / "log"
    started: list[subprocess.Popen[str]] = []
    with log.open("a") as errors:

        def start(arguments: Iterable[str], stdout: int) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [python, *arguments], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=stdout,
                stderr=errors, text=True,
            )  # fmt: skip
            started.append(process)
            return process

        try:
            if system.worker:
                arguments = [argument.format(port=server.port, url=server.url) for argument in system.worker]
                environment["PEERS_SERVER_PID"] = str(server.pid)
                environment["PEERS_WORKER_PID"] = str(start(arguments, errors.fileno()).pid)
            client = start(("-m", module(system.name)), subprocess.PIPE)
            try:
                output, _ = client.communicate(timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                kill_all(client.pid)
                output, _ = client.communicate()
        finally:
            for process in started:
                kill_all(process.pid)
                process.wait()
    figures = parse(output)
    if client.returncode or "failed:" in log.read_text():
        print(f"{system.name} ended with {client.returncode}; its log ends\n{log.read_text()[-3000:]}", file=sys.stderr)
    return figures


def parse(output: str) -> dict[str, float]:
    """What a client has said, among whatever its libraries print."""
    figures: dict[str, float] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            figures |= json.loads(line)
    return figures


def environment(systems: Iterable[System], *, aof: bool) -> dict[str, str]:
    server = Server("valkey").start()
    try:
        with server.connect_blocking() as client:
            info = client.info("server")
    finally:
        server.stop()
    own = (f"{name} {version(name)}" for name in ("millstream", "hiredis", "uvloop"))
    packages = {package.replace("==", " "): None for system in systems for package in system.packages}
    return {
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "machine": platform.machine(),
        "server": f"{info.get('server_name', 'redis')} {info.get('valkey_version', info['redis_version'])}",
        "AOF": "everysec" if aof else "off",
        "and": "; ".join((*own, *packages)),
    }


def prepare(systems: Iterable[System], cache: Path) -> tuple[dict[System, str], list[str]]:
    """The interpreter of each, and what is left out for want of one."""
    pythons: dict[System, str] = {}
    notes: list[str] = []
    for system in systems:
        try:
            pythons[system] = python_of(system.name, system.packages, cache, system.needs)
        except (LookupError, subprocess.CalledProcessError) as error:
            notes.append(f"{system.name}: {error}")
    return pythons, notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--systems", type=told(chosen), default="", help="some of " + ",".join(system.name for system in SYSTEMS)
    )
    parser.add_argument("--rounds", type=at_least_one, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="about what one workload is to take")
    parser.add_argument("--aof", action="store_true", help="a durable server (AOF everysec)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--page", type=Path, help="write the tables into this page, between its two markers")
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    if options.page:
        check_page(parser, options.page, report.BEGIN, report.END)
    pythons, notes = prepare(options.systems, options.cache)
    results: report.Rounds = {system.name: [] for system in pythons}
    for number in range(options.rounds):
        for system, python in pythons.items():
            results[system.name].append(round_of(system, python, seconds=options.seconds, aof=options.aof))
            print(f"round {number + 1} of {options.rounds}: {system.name} done", file=sys.stderr)
    about = environment(pythons, aof=options.aof)
    print(report.section(results, about, notes))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": about, "left out": notes, "rounds": results}, indent=1))
    if options.plot:
        facts = ", ".join(f"{name} {value}" for name, value in about.items() if name != "and")
        report.plot(
            results, f"one client, one worker process, medians of {options.rounds} rounds ({facts})", options.plot
        )
    if options.page:
        text = report.section(results, about, notes)
        if options.plot:
            text = f"![Requests per second and serial latency]({seen_from(options.page, options.plot)})\n\n{text}"
        if options.json:
            text += f"\nAll rounds are in [{options.json.name}]({seen_from(options.page, options.json)}).\n"
        options.page.write_text(report.with_section(options.page.read_text(), text))


def seen_from(page: Path, file: Path) -> str:
    return os.path.relpath(file, page.parent)
