"""The systems: what each is made of, and how its one worker is started. Why these settings is in its `with_` module."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class System:
    name: str
    packages: tuple[str, ...]  # none: this very environment
    worker: tuple[str, ...]  # arguments of Python, with {port} and {url}; none: the client starts it
    needs: tuple[int, int] = (3, 11)


def module(name: str) -> str:
    return f"benchmarks.peers.with_{name}"


UVLOOP, HIREDIS = "uvloop==0.23.0", "hiredis==3.5.0"

FLOOR = System("floor", (), ("-m", "benchmarks.floor.worker", "{port}"))

SYSTEMS = (
    FLOOR,
    System("millstream", (), ("-c", "from millstream.cli import main; main()", "run", f"{module('millstream')}:app")),
)
