"""`millstream doctor`: is everything as it should be, and what to do where it is not."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import click

from millstream.cli.options import (
    Server,
    counted,
    for_people,
    json_option,
    print_json,
    reason_for_replicas,
    server_options,
)
from millstream.config import Settings, redact
from millstream.errors import BrokerUnavailableError, MillstreamError, SignatureError

if TYPE_CHECKING:
    from millstream.broker.records import DeploymentView
    from millstream.broker.registry import Registry

OLDEST = (7, 0)  # Redis that knows what our scripts use; Valkey 9.1 calls itself 7.2.4
PINGS = 200
SLOW_MS = 5.0  # a loopback PING takes 0.1 ms, one across a data centre 1 ms
CLOCKS_APART_S = 1.0
FULL, ALMOST_FULL = 0.95, 0.8
STALLED_S = 60.0


class Verdict(StrEnum):
    GOOD = "good"
    DOUBTFUL = "doubtful"
    BAD = "bad"


SIGNS = {Verdict.GOOD: "✔", Verdict.DOUBTFUL: "!", Verdict.BAD: "✘"}
COLOURS = {Verdict.GOOD: "green", Verdict.DOUBTFUL: "yellow", Verdict.BAD: "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    verdict: Verdict
    text: str


def good(check: str, text: str) -> Finding:
    return Finding(check, Verdict.GOOD, text)


def doubtful(check: str, text: str) -> Finding:
    return Finding(check, Verdict.DOUBTFUL, text)


def bad(check: str, text: str) -> Finding:
    return Finding(check, Verdict.BAD, text)


@click.command()
@json_option
@server_options
def doctor(server: Server, as_json: bool) -> None:
    """Check server, secret and processes.

    Exit code 1 if something is wrong (✘).
    """
    import asyncio

    findings = asyncio.run(_examine(server))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            sign = click.style(SIGNS[finding.verdict], fg=COLOURS[finding.verdict])
            click.echo(f"{sign} {finding.check:<12} {finding.text}")
    if any(finding.verdict is Verdict.BAD for finding in findings):
        raise SystemExit(1)


async def _examine(server: Server) -> list[Finding]:
    from millstream.broker.connection import open_control, ping
    from millstream.broker.registry import Registry

    try:
        settings = server.settings()
    except BrokerUnavailableError as e:
        return [bad("server", str(e))]
    client = open_control(settings, "ms:doctor")
    registry = Registry(client, settings)
    try:
        await ping(client, settings)
        return await _examine_all(registry)
    except MillstreamError as e:
        return [bad("server", str(e))]
    finally:
        await client.aclose()


async def _examine_all(registry: "Registry") -> list[Finding]:
    findings: list[Finding] = []
    checks: tuple[Callable[[Registry], Awaitable[list[Finding]]], ...] = (
        _server, _persistence, _scripts, _latency, _clock, _secret, _processes, _deployments, _orphans, _leaks,
    )  # fmt: skip
    for check in checks:
        findings += await _tried(check, registry)
    return findings


async def _tried(check: "Callable[[Registry], Awaitable[list[Finding]]]", registry: "Registry") -> list[Finding]:
    """What the server refuses to tell (ACLs, a managed service) is a finding as well."""
    from millstream.broker.connection import ANY_TROUBLE

    try:
        return await check(registry)
    except ANY_TROUBLE as e:
        return [bad(check.__name__.strip("_"), f"the server refused: {e}")]


# by INFO


def flavour(info: dict[str, Any], settings: Settings) -> Finding:
    where = f"at {redact(settings.url)}"
    version = str(info.get("redis_version", "?"))
    if "valkey_version" in info:
        return good("server", f"Valkey {info['valkey_version']} {where}")
    if "dragonfly_version" in info:
        return doubtful("server", f"Dragonfly {info['dragonfly_version']} {where}: millstream is not tested on it")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        return bad("server", f"Redis {version} {where} is too old: it must be 7.0, or Valkey 9.1")
    return good("server", f"Redis {version} {where}")


def eviction(info: dict[str, Any]) -> Finding:
    policy = str(info.get("maxmemory_policy", "?"))
    if policy == "noeviction":
        return good("eviction", "maxmemory-policy is noeviction")
    return bad(
        "eviction",
        f"maxmemory-policy is {policy}: a full server would throw requests away; CONFIG SET maxmemory-policy noeviction",
    )


def memory(info: dict[str, Any]) -> Finding:
    used, limit = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    if not limit:
        total = int(info.get("total_system_memory", 0))
        of = f" of the machine's {size(total)}" if total else ""
        return good("memory", f"{size(used)} used{of}; no maxmemory is set")
    text = f"{size(used)} used of maxmemory {size(limit)} ({used / limit:.0%})"
    if used >= FULL * limit:
        return bad("memory", f"{text}: new requests are refused; raise maxmemory, or let the backlog shrink")
    return doubtful("memory", f"{text}: it fills up") if used >= ALMOST_FULL * limit else good("memory", text)


def persistence(info: dict[str, Any], save: str | None) -> Finding:
    """`save` is the server's setting of that name, None if it does not tell."""
    if info.get("aof_enabled"):
        if info.get("aof_last_write_status", "ok") != "ok":
            return bad("persistence", "the last write to the append-only file failed: is the disk full?")
        return good("persistence", "append-only file is on")
    if info.get("rdb_last_bgsave_status", "ok") != "ok":
        return bad("persistence", "the last snapshot failed, and the server may refuse writes: is the disk full?")
    lost = "everything" if save == "" else "what came after the last snapshot"
    text = f"no append-only file: a crash of the server loses {lost}; CONFIG SET appendonly yes"
    return doubtful("persistence", text)


def size(count: int) -> str:
    amount, units = float(count), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while amount >= 1000:
        amount, unit = amount / 1000, next(units, "TB")
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"


# by asking


async def _server(registry: "Registry") -> list[Finding]:
    info: dict[str, Any] = await registry.client.info()
    return [flavour(info, registry.settings), eviction(info), memory(info)]


async def _persistence(registry: "Registry") -> list[Finding]:
    from millstream.broker.connection import ANY_TROUBLE

    try:
        save = (await registry.client.config_get("save")).get("save")
    except ANY_TROUBLE:
        save = None
    return [persistence(await registry.client.info("persistence"), save)]


async def _scripts(registry: "Registry") -> list[Finding]:
    """By trying: managed services forbid some of it, and versions say little."""
    await registry.client.eval("#!lua flags=no-writes,allow-oom\nreturn redis.call('TIME')", 0)
    return []


async def _latency(registry: "Registry") -> list[Finding]:
    times = []
    for _ in range(PINGS):
        started = time.perf_counter()
        await registry.client.ping()
        times.append((time.perf_counter() - started) * 1000)
    times.sort()
    median, late = times[PINGS // 2], times[PINGS * 99 // 100]
    text = f"{median:.2f} ms for a PING (p50), {late:.2f} ms at p99"
    return [
        doubtful("latency", f"{text}: is the server far away, or busy?") if median > SLOW_MS else good("latency", text)
    ]


async def _clock(registry: "Registry") -> list[Finding]:
    before = time.time()
    server_s = await registry.now_ms() / 1000
    apart = abs(server_s - (before + time.time()) / 2)
    if apart > CLOCKS_APART_S:
        return [doubtful("clock", f"the server's clock is {for_people(apart)} from this host's; the server's decides")]
    return [good("clock", "the server's agrees with this host's")]


async def _secret(registry: "Registry") -> list[Finding]:
    try:
        await registry.check_secret(only_look=True)
    except SignatureError as e:
        return [bad("secret", str(e))]
    if registry.settings.is_public:
        text = "none is set: whoever can write to the server can run code in replicas; set MILLSTREAM_SECRET_KEY everywhere"
        return [doubtful("secret", text)]
    is_used = await registry.client.exists(registry.keys.secret_check)
    return [
        good("secret", "set, and the one this namespace is used with" if is_used else "set; nobody has used it here")
    ]


async def _processes(registry: "Registry") -> list[Finding]:
    nodes = await registry.nodes()
    is_led = bool(await registry.client.exists(registry.keys.leader))
    worse = bad if await registry.apps() else doubtful  # nothing deployed: nothing is missed yet
    launchers, autoscaler = "start one with `millstream launcher`", "start one with `millstream autoscaler`"
    return [
        good("launchers", f"{counted(len(nodes), 'node')}: {', '.join(sorted(nodes))}")
        if nodes
        else worse("launchers", f"none is alive, so no replica can start; {launchers}"),
        good("autoscaler", "alive")
        if is_led
        else worse("autoscaler", f"none is alive, so no deployment gets replicas; {autoscaler}"),
    ]


async def _deployments(registry: "Registry") -> list[Finding]:
    views = await registry.views()
    findings = [finding for view in views if (finding := replicas(view)) is not None]
    findings += [finding for view in views if (finding := stalled(view)) is not None]
    for view in views:
        if dead := await registry.dead_count(view.tag):
            findings.append(
                doubtful(
                    "dead letters",
                    f"{view.tag} has {dead}: requests whose attempts are used up; `millstream dead list` shows them",
                )
            )
    if views and all(finding.verdict is Verdict.GOOD for finding in findings):
        findings.append(good("deployments", f"{counted(len(views), 'deployment')}, all with the replicas they need"))
    return findings or [good("deployments", "nothing is deployed")]


def replicas(view: "DeploymentView") -> Finding | None:
    """What is wrong with a deployment's replicas; None if nothing is."""
    if view.failure:
        return bad("deployments", f"{view.tag} cannot start: {view.failure}")
    if view.running or (view.has_target and view.target == 0 and not view.backlog.waiting):
        return None
    waiting = f", {counted(view.backlog.waiting, 'request')} waiting" if view.backlog.waiting else ""
    if any(replica.state == "STARTING" for replica in view.replicas):
        return doubtful("deployments", f"{view.tag} has no replica yet, one is starting{waiting}")
    if view.has_target and view.target == 0:
        return doubtful("deployments", f"{view.tag} is at zero replicas ({reason_for_replicas(view)}){waiting}")
    return bad("deployments", f"{view.tag} has no replica{waiting}; the launcher's output may say why")


def stalled(view: "DeploymentView") -> Finding | None:
    """Do requests wait for long although there are replicas with free slots? None if not."""
    oldest_s, backlog = view.backlog.oldest_waiting_s, view.backlog
    if not view.running or not backlog.waiting or oldest_s is None or oldest_s < STALLED_S:
        return None
    if backlog.in_flight >= len(view.running) * (view.config.max_ongoing_requests or view.config.sync_threads):
        return None
    return doubtful(
        "queue",
        f"{view.tag}: the oldest of {counted(backlog.waiting, 'request')} has been waiting for {for_people(oldest_s)}, and "
        f"{counted(len(view.running), 'replica')} with {backlog.in_flight} in flight should have taken it; "
        "look at their output, or restart the launcher",
    )


async def _leaks(registry: "Registry") -> list[Finding]:
    from millstream.broker.leaks import find_leaks

    leaks = await find_leaks(registry)
    looked_at = f"{counted(leaks.looked_at, 'key')}{'' if leaks.is_complete else ' of more'} looked at"
    if not leaks.keys:
        return [good("keys", f"{looked_at}: each has an owner or an end")]
    some = ", ".join(leaks.keys[:3]) + (", ..." if len(leaks.keys) > 3 else "")
    return [
        doubtful(
            "keys", f"{looked_at}: {counted(len(leaks.keys), 'key')} without owner or end: {some}; UNLINK removes one"
        )
    ]


async def _orphans(registry: "Registry") -> list[Finding]:
    """Consumers that hold requests and whose replica has no lease: sweepers take care of them within a few leases."""
    from millstream.broker.lookup import orphans

    findings = []
    for view in await registry.views():
        for replica, held in (await orphans(registry, view.tag)).items():
            findings.append(
                doubtful(
                    "orphans",
                    f"{view.tag}: {replica} has no lease and holds {counted(held, 'request')}; "
                    "any replica, launcher or autoscaler gives them to others within seconds",
                )
            )
    return findings
