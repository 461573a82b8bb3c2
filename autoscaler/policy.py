"""Readings -> how many replicas, and why. Pure functions: the clock and the server are outside.

`backlog` (the default) is rate plus backlog by Little's law: enough replicas for the arrivals, plus what pays the
backlog off within the target latency. `ray` is Ray Serve's formula (mean ongoing over a look-back, factors, delays).
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from millstream.autoscaler.readings import Rates, Reading
from millstream.config import AutoscalingConfig, DeploymentConfig

UTILISATION = 0.8  # replicas are planned to be busy so much: a queue at 1.0 grows without bound
COLD_START_S = 1.0  # assumed; a fork from a warm parent takes about 0.1 s, a model load its own time


@dataclass(frozen=True, slots=True)
class Memory:
    """What a policy remembers from tick to tick."""

    wanted: tuple[tuple[float, int], ...] = ()  # (when, how many) within the hold window
    busy_at_s: float = -math.inf  # when there last was anything to do
    above_since_s: float | None = None  # since when more replicas are wanted than there are
    below_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    target: int
    reason: str
    memory: Memory
    inputs: dict[str, Any] = field(default_factory=dict)


def decide(
    config: DeploymentConfig,
    override: dict[str, Any] | None,
    target: int | None,
    reading: Reading,
    rates: Rates,
    memory: Memory,
    window: list[Reading],
) -> Decision:
    """The number of replicas for one deployment. `target` is the present one, None for a new deployment."""
    if override and "num_replicas" in override:
        return Decision(override["num_replicas"], f"an operator set num_replicas={override['num_replicas']}", memory)
    scaling = config.autoscaling
    if scaling is None:
        return Decision(config.num_replicas, f"num_replicas={config.num_replicas}", memory)
    if override:
        bounds = {"min_replicas": scaling.min_replicas, "max_replicas": scaling.max_replicas, **override}
        bounds["max_replicas"] = max(bounds.values())  # one set before a redeploy may contradict the other of now
        scaling = replace(scaling, initial_replicas=None, **bounds)
    memory = _remember_work(memory, reading, window)
    if target is None:
        first = scaling.initial_replicas if scaling.initial_replicas is not None else scaling.min_replicas
        return Decision(
            first, "first deployment: initial_replicas or min_replicas", replace(memory, busy_at_s=reading.at_s)
        )
    if target > scaling.max_replicas:  # lowered by an operator or a new version: that is no case for a delay
        return Decision(scaling.max_replicas, f"limited by max_replicas={scaling.max_replicas}", memory)
    policy = _ray if scaling.policy == "ray" else _backlog
    return policy(scaling, config.max_ongoing_requests or 1, target, reading, rates, memory, window)


def is_scaled(config: DeploymentConfig, override: dict[str, Any] | None) -> bool:
    """Does the load decide, and not a fixed number?"""
    return config.autoscaling is not None and "num_replicas" not in (override or {})


def _remember_work(memory: Memory, reading: Reading, window: list[Reading]) -> Memory:
    # Short requests come and go between two readings: only the count of arrivals shows them.
    has_worked = len(window) > 1 and reading.backlog.arrivals > window[-2].backlog.arrivals
    if reading.waiting or reading.in_flight or has_worked or memory.busy_at_s == -math.inf:
        return replace(memory, busy_at_s=reading.at_s)
    return memory


def wanted_by_backlog(scaling: AutoscalingConfig, slots: float, reading: Reading, rates: Rates) -> tuple[int, str]:
    """Little's law: arrivals x service time keeps the flow, waiting x service time pays off what has piled up."""
    waiting, in_flight = reading.waiting, reading.in_flight
    if waiting + in_flight == 0 and rates.arrivals_per_s == 0:
        return 0, "nothing waits, runs or arrives"
    service = rates.service_time_s
    if service is None:
        wanted = min(waiting + in_flight, math.ceil((waiting + in_flight) / (0.7 * slots)))
        return wanted, f"{waiting} waiting and {in_flight} in flight, service time not known yet"
    flow = rates.arrivals_per_s * service / (slots * UTILISATION)
    drain = waiting * service / (slots * (COLD_START_S + scaling.target_queue_latency_s))
    wanted = math.ceil(max(flow, in_flight / slots) + drain - 1e-9)
    reason = (
        f"{rates.arrivals_per_s:.1f} arrivals/s of {service * 1000:.0f} ms need {flow:.1f}, "
        f"{in_flight} in flight need {in_flight / slots:.1f}, {waiting} waiting need {drain:.1f} more"
    )
    return wanted, reason


def _backlog(
    scaling: AutoscalingConfig,
    max_ongoing: int,
    target: int,
    reading: Reading,
    rates: Rates,
    memory: Memory,
    window: list[Reading],
) -> Decision:
    slots = min(float(max_ongoing), scaling.target_ongoing_requests)
    wanted, reason = wanted_by_backlog(scaling, slots, reading, rates)
    if reading.waiting and wanted == 0:
        wanted = 1
    if not reading.waiting and not reading.in_flight:
        wanted = min(wanted, target)  # with nothing to do, a rate of the past is no reason to grow
    clamped, reason = _clamp(scaling, wanted, reason)
    memory = _hold(memory, reading.at_s, clamped, scaling.downscale_delay_s)
    inputs = _inputs(reading, rates, wanted)
    if clamped > target:
        return _up(scaling, target, clamped, reason, reading, memory, inputs)
    memory = replace(memory, above_since_s=None)
    if clamped < target:
        return _down(scaling, target, reason, reading, memory, inputs)
    return Decision(target, reason, memory, inputs)


def _up(
    scaling: AutoscalingConfig,
    target: int,
    wanted: int,
    reason: str,
    reading: Reading,
    memory: Memory,
    inputs: dict[str, Any],
) -> Decision:
    """At once by default; from zero, and when the queue is older than it may be, always at once."""
    since = reading.at_s if memory.above_since_s is None else memory.above_since_s
    memory = replace(memory, above_since_s=since)
    is_late = (reading.backlog.oldest_waiting_s or 0.0) > scaling.target_queue_latency_s
    if target == 0 or is_late or reading.at_s - since >= scaling.upscale_delay_s:
        return Decision(wanted, reason, replace(memory, above_since_s=None), inputs)
    return Decision(target, f"{reason}; waiting for upscale_delay_s={scaling.upscale_delay_s:g}", memory, inputs)


def _down(
    scaling: AutoscalingConfig, target: int, reason: str, reading: Reading, memory: Memory, inputs: dict[str, Any]
) -> Decision:
    """Only to the most that was wanted in the hold window; to zero only after to_zero_delay_s without any work."""
    held = max(n for _, n in memory.wanted)
    if held == 0:
        idle_s = reading.at_s - memory.busy_at_s
        if idle_s >= scaling.to_zero_delay_s:
            return Decision(0, f"idle for {idle_s:.0f} s", memory, inputs)
        held = 1
    if held < target:
        return Decision(
            held, f"no more than {held} wanted for {scaling.downscale_delay_s:g} s; now: {reason}", memory, inputs
        )
    return Decision(target, f"{reason}; held by downscale_delay_s={scaling.downscale_delay_s:g}", memory, inputs)


def _hold(memory: Memory, now_s: float, wanted: int, hold_s: float) -> Memory:
    kept = tuple((at, n) for at, n in memory.wanted if at >= now_s - hold_s)
    return replace(memory, wanted=(*kept, (now_s, wanted)))


def _clamp(scaling: AutoscalingConfig, wanted: int, reason: str) -> tuple[int, str]:
    if wanted > scaling.max_replicas:
        return scaling.max_replicas, f"{reason}: {wanted}, limited by max_replicas={scaling.max_replicas}"
    if wanted < scaling.min_replicas:
        return scaling.min_replicas, f"{reason}: kept at min_replicas={scaling.min_replicas}"
    return wanted, reason


def _ray(
    scaling: AutoscalingConfig,
    max_ongoing: int,
    target: int,
    reading: Reading,
    rates: Rates,
    memory: Memory,
    window: list[Reading],
) -> Decision:
    """Ray Serve's `replica_queue_length_autoscaling_policy`: desired = mean ongoing / target, with factors and delays."""
    recent = [r for r in window if r.at_s >= reading.at_s - scaling.look_back_period_s]
    ongoing = sum(r.waiting + r.in_flight for r in recent) / len(recent)
    inputs = {**_inputs(reading, rates, 0), "mean_ongoing": round(ongoing, 2)}
    if target == 0:
        wanted = math.ceil(scaling.upscaling_factor) if reading.waiting + reading.in_flight else 0
        clamped, reason = _clamp(scaling, wanted, f"{reading.waiting + reading.in_flight} requests and no replica")
        return Decision(clamped, reason, memory, inputs)
    delta = ongoing / scaling.target_ongoing_requests - target
    factor = scaling.upscaling_factor if delta > 0 else scaling.downscaling_factor
    scaled = math.ceil(target + factor * delta - 1e-9)
    clamped, reason = _clamp(scaling, scaled, f"mean of {ongoing:.1f} ongoing over {scaling.look_back_period_s:g} s")
    inputs["wanted"] = clamped
    if clamped > target:
        since = reading.at_s if memory.above_since_s is None else memory.above_since_s
        memory = replace(memory, above_since_s=since, below_since_s=None)
        if reading.at_s - since >= scaling.upscale_delay_s:
            return Decision(clamped, reason, replace(memory, above_since_s=None), inputs)
    elif clamped < target:
        since = reading.at_s if memory.below_since_s is None else memory.below_since_s
        memory = replace(memory, below_since_s=since, above_since_s=None)
        to_zero = clamped == 0 and target == 1
        if reading.at_s - since >= (scaling.to_zero_delay_s if to_zero else scaling.downscale_delay_s):
            return Decision(
                clamped if to_zero else max(1, clamped), reason, replace(memory, below_since_s=None), inputs
            )
    else:
        memory = replace(memory, above_since_s=None, below_since_s=None)
    return Decision(target, f"{reason}; no change yet", memory, inputs)


def _inputs(reading: Reading, rates: Rates, wanted: int) -> dict[str, Any]:
    return {
        "wanted": wanted,
        "waiting": reading.waiting,
        "in_flight": reading.in_flight,
        "arrivals_per_s": round(rates.arrivals_per_s, 3),
        "completions_per_s": round(rates.completions_per_s, 3),
        "service_time_s": round(rates.service_time_s, 6) if rates.service_time_s is not None else "",
        "oldest_waiting_s": reading.backlog.oldest_waiting_s if reading.backlog.oldest_waiting_s is not None else "",
        "running": reading.running,
        "starting": reading.starting,
    }
