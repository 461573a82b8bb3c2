"""What a workload is told: how long, and how large."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class How:
    seconds: float = 1.0  # about what one figure is to take
    aof: bool = False
    deployments: int = 1_000
    backlog: int = 1_000_000
    idle_s: float = 20.0
