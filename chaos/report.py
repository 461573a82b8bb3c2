"""The report of a run: as text for people, as JSON for machines."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from chaos.judge import Fault, Verdict

SHOWN = 10  # of what should not be there


def as_text(verdict: Verdict, faults: Sequence[Fault], about: str) -> str:
    harms = Counter(str(fault.harm) for fault in faults)
    ended = ", ".join(f"{count:,} {what}" for what, count in sorted(verdict.ended.items()))
    lines = [
        f"{verdict.requests:,} requests, {verdict.attempts:,} attempts ({about})",
        (
            f"faults: {', '.join(f'{count} {harm}' for harm, count in sorted(harms.items()))}; "
            f"{sum(fault.kills for fault in faults)} SIGKILLs of replicas, launchers, autoscaler and clients"
        ),
        (
            f"ended: {ended}; {verdict.followed:,} of them followed by the successor of a killed client, "
            f"and {verdict.left_by_killed_clients:,} more left by killed clients without a ref"
        ),
        "",
        *(_count(name, found) for name, found in _findings(verdict).items()),
        f"extra attempts, all with a cause     {verdict.extra_attempts - len(verdict.unexplained):>8,}",
        _count("near a loss of data (apart)", verdict.near_a_loss),
        "",
        f"{'takeover after':<34} {'requests':>8} {'p50':>8} {'p99':>8} {'max':>8}",
        *(_times(name, times) for name, times in sorted(verdict.takeovers.items())),
        "",
        "nothing is lost" if verdict.is_good else "THE PROMISE IS BROKEN",
    ]
    return "\n".join(lines)


def _findings(verdict: Verdict) -> dict[str, list[str]]:
    return {
        "lost": verdict.lost,
        "results accepted twice": verdict.accepted_twice,
        "unexplained extra attempts": verdict.unexplained,
        "hung callers": verdict.hung,
        "left in the server": verdict.left_in_server,
    }


def _count(name: str, found: list[str]) -> str:
    shown = "".join(f"\n    {what}" for what in found[:SHOWN])
    more = f"\n    ... and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
    return f"{name:<36} {len(found):>8,}{shown}{more}"


def _times(name: str, times: list[float]) -> str:
    p50, p99, most = (percentile(times, p) for p in (50, 99, 100))
    return f"{name:<34} {len(times):>8,} {p50:>6.3f} s {p99:>6.3f} s {most:>6.3f} s"


def percentile(times: Sequence[float], p: float) -> float:
    """The smallest that is not below p % of them."""
    return sorted(times)[max(0, math.ceil(len(times) * p / 100) - 1)]


def as_json(verdict: Verdict, faults: Sequence[Fault], environment: dict[str, Any]) -> dict[str, Any]:
    takeovers = {
        name: {"requests": len(times), **{f"p{p}_s": percentile(times, p) for p in (50, 99, 100)}}
        for name, times in verdict.takeovers.items()
    }
    return {
        "environment": environment,
        "is_good": verdict.is_good,
        "verdict": {**asdict(verdict), "takeovers": takeovers},
        "faults": [asdict(fault) for fault in faults],
    }
