"""Chaos: requests of all kinds from several client processes, while everything is killed, stopped, cut off and restarted.

    make chaos     (python -m chaos [--seed 1] [--requests 200000] [--rate 400] [--server-faults orderly|kill-always|kill-everysec])

Prints the faults as they come, and in the end what became of every request; fails if one was lost, run twice without a
cause, accepted twice, or left its caller hanging. The same seed gives the same requests and the same faults at the same
times; which process a fault hits is up to who lives then.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from chaos.plan import Harm, ServerFaults, mix
from chaos.report import as_json, as_text
from chaos.run import run
from chaos.world import Load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--rate", type=float, default=400.0, help="requests per second, of all clients together")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--only", type=_counts, help="these faults instead, as in kill-replica=10,cut=3")
    parser.add_argument("--server-faults", type=ServerFaults, choices=list(ServerFaults), default=ServerFaults.ORDERLY)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="a folder for ledgers and logs; else a temporary one")
    o = parser.parse_args()
    folder = o.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    load, started_s = Load(o.seed, o.requests, o.clients, o.rate), time.monotonic()
    how_many = o.only or mix(load.duration_s)
    outcome = run(folder, load, how_many, o.server_faults, say=_say)
    about = f"seed {o.seed}, {o.server_faults}, {o.clients} clients, {time.monotonic() - started_s:.0f} s"
    print(as_text(outcome.verdict, outcome.faults, about))
    print(", ".join(f"{name} {value}" for name, value in outcome.environment.items()))
    if o.json:
        report = as_json(outcome.verdict, outcome.faults, {"run": about, **outcome.environment})
        o.json.write_text(json.dumps(report, indent=1))
    if not outcome.verdict.is_good:
        sys.exit(f"ledgers and logs are in {folder}")
    if o.keep is None:
        shutil.rmtree(folder)


def _counts(text: str) -> dict[Harm, int]:
    """From `kill-replica=10,cut=3`."""
    return {Harm(name): int(count) for name, _, count in (one.partition("=") for one in text.split(","))}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
