"""What is to happen, from a seed: which requests each client makes, and which faults come when. Pure: no clock, no processes."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Of a request, or a few that belong together."""

    CALL = "call"
    BLOCKING = "blocking"  # by a synchronous handle, in a thread
    MAP = "map"  # MAPPED of them
    CHAIN = "chain"  # two: the first is the argument of the second
    THREADED = "threaded"  # a sync method
    SLOW = "slow"
    FLAKY = "flaky"  # raises once or twice, and is tried again
    STREAM = "stream"
    CANCEL = "cancel"  # a slow one, cancelled on its way
    KEYED = "keyed"  # sent twice under one idempotency key


MAPPED = 20
# Steps of each kind out of a hundred; by requests, some three quarters are of maps and chains.
SHARES = {
    Kind.CALL: 22, Kind.BLOCKING: 5, Kind.MAP: 14, Kind.CHAIN: 8, Kind.THREADED: 8, Kind.SLOW: 25, Kind.FLAKY: 5,
    Kind.STREAM: 5, Kind.CANCEL: 3, Kind.KEYED: 5,
}  # fmt: skip
REQUESTS = {Kind.MAP: MAPPED, Kind.CHAIN: 2}  # of one step; 1 of all others


@dataclass(frozen=True, slots=True)
class Step:
    """What a client does at once: the requests `number`, `number` + 1, ... of one kind."""

    number: int
    kind: Kind
    chance: float  # what else is left to it: how long, how often, how soon

    @property
    def count(self) -> int:
        return REQUESTS.get(self.kind, 1)


def steps(seed: int, client: int, requests: int) -> Iterator[Step]:
    """The steps of one client, until it has made at least so many requests."""
    chance, number = random.Random(f"{seed}:client {client}"), 0
    kinds, weights = list(SHARES), list(SHARES.values())
    while number < requests:
        step = Step(number, chance.choices(kinds, weights)[0], chance.random())
        yield step
        number += step.count


class Harm(StrEnum):
    """What is done to whom."""

    KILL_REPLICA = "kill-replica"
    KILL_LAUNCHER = "kill-launcher"
    KILL_AUTOSCALER = "kill-autoscaler"
    KILL_CLIENT = "kill-client"
    VANISH_HOST = "vanish-host"  # SIGKILL of a launcher and all that it has started
    STOP_REPLICA = "stop-replica"  # SIGSTOP, for good
    PAUSE_REPLICA = "pause-replica"  # SIGSTOP, and SIGCONT well within the health timeout
    PAUSE_LAUNCHER = "pause-launcher"  # SIGSTOP for longer than a lease
    CUT = "cut"  # some connections end in the middle of what they carry
    STALL = "stall"  # nothing passes for a while
    SERVER = "server"  # it ends, in the way of this run, and comes back


class ServerFaults(StrEnum):
    """How the server ends."""

    ORDERLY = "orderly"  # SIGTERM; AOF everysec
    KILL_ALWAYS = "kill-always"  # SIGKILL; appendfsync always
    KILL_EVERYSEC = (
        "kill-everysec"  # SIGKILL, and the last second of the AOF is gone: as if the host had lost its power
    )


# In FULL_S seconds: more than a hundred SIGKILLs, since a host takes several with it.
FULL_S = 500.0
FULL = {
    Harm.KILL_REPLICA: 60, Harm.KILL_LAUNCHER: 8, Harm.KILL_AUTOSCALER: 8, Harm.KILL_CLIENT: 14, Harm.VANISH_HOST: 6,
    Harm.STOP_REPLICA: 8, Harm.PAUSE_REPLICA: 8, Harm.PAUSE_LAUNCHER: 4, Harm.CUT: 24, Harm.STALL: 6, Harm.SERVER: 5,
}  # fmt: skip

LASTS_S = {  # from, to
    Harm.PAUSE_REPLICA: (0.2, 1.0), Harm.PAUSE_LAUNCHER: (8.0, 14.0), Harm.STALL: (0.2, 1.5), Harm.SERVER: (0.1, 2.0),
    Harm.KILL_LAUNCHER: (0.5, 3.0), Harm.VANISH_HOST: (0.5, 8.0), Harm.KILL_CLIENT: (0.1, 1.0),
    Harm.KILL_AUTOSCALER: (0.1, 3.0),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault to come. `target` picks among those there are at that moment; `lasts_s` is until it is over, where it is."""

    at_s: float  # from the start of the load
    harm: Harm
    target: float
    lasts_s: float


def mix(duration_s: float) -> dict[Harm, int]:
    """How many of each: as dense as in a full run, and one of each kind at least."""
    return {harm: max(1, round(count * duration_s / FULL_S)) for harm, count in FULL.items()}


def faults(seed: int, duration_s: float, how_many: dict[Harm, int]) -> list[Planned]:
    """The faults of a run, in their order, spread over its time: load comes before the first and after the last."""
    chance = random.Random(f"{seed}:faults")
    harms = [harm for harm, count in how_many.items() for _ in range(count)]
    chance.shuffle(harms)
    first_s, last_s = duration_s * 0.05, duration_s * 0.92
    gap_s = (last_s - first_s) / max(1, len(harms))
    return [
        Planned(
            first_s + (i + chance.random()) * gap_s,
            harm,
            chance.random(),
            chance.uniform(*LASTS_S.get(harm, (0.0, 0.0))),
        )
        for i, harm in enumerate(harms)
    ]
