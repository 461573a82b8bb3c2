"""The client of one workload, in one process: it starts millstream as a user would, measures, and ends all.

    python -m benchmarks.suite.one NAME '{"seconds": 0.1}'

Prints its figures as lines of JSON.
"""

import importlib
import json
import sys
from pathlib import Path

import millstream
from benchmarks.suite.how import How
from millstream import serve
from millstream.runtime import ensure_running


def main() -> None:
    name, how = sys.argv[1], How(**json.loads(sys.argv[2]))
    try:
        if how.aof:
            ensure_running(Path("state"))
        importlib.import_module(f"benchmarks.suite.{name}").measure(how)
    finally:
        try:
            serve.shutdown()
        finally:
            millstream.shutdown()


if __name__ == "__main__":
    main()
