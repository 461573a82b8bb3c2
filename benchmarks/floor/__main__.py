"""The floor alone: what Python does at most over one server with one client and one worker, without any guarantee.

    python -m benchmarks.floor [--rounds 5] [--seconds 1] [--aof] [--json FILE]

Figures are medians over the rounds, with minimum and maximum.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.peers.report import COLUMNS, spread
from benchmarks.peers.run import environment, round_of
from benchmarks.peers.systems import FLOOR


def figures(*, seconds: float = 1.0, aof: bool = False) -> dict[str, float]:
    """Of one round, on a new server."""
    return round_of(FLOOR, sys.executable, seconds=seconds, aof=aof)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="about what one workload is to take")
    parser.add_argument("--aof", action="store_true", help="a durable server (AOF everysec)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rounds = [figures(seconds=options.seconds, aof=options.aof) for _ in range(options.rounds)]
    about = environment([FLOOR], aof=options.aof)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'':28} {'median':>12} {'min':>12} {'max':>12}")
    for name, title in COLUMNS.items():
        if (found := spread(rounds, name)) is not None:
            print(f"{title:28} " + " ".join(f"{value:12,.{0 if value > 1000 else 3}f}" for value in found))
    if options.json:
        options.json.write_text(json.dumps({"environment": about, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
