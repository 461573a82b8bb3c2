"""The workloads, by the names of their modules, and what their figures are called in the tables."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table. `floor` is the figure of the floor that stands beside."""

    title: str
    figure: str
    unit: str
    floor: str = ""


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    title: str
    rows: tuple[Row, ...]
    limit_s: float = 180.0  # for one round of it; what it has not measured by then is left out


def _rate(title: str, figure: str, *parties: str, floor: str = "") -> tuple[Row, ...]:
    """Requests per second, and the CPU time of each party."""
    cpu = (
        Row(f"{title}: CPU of the {party}", f"{figure}, {party}", "µs", floor and f"{floor}, {party}")
        for party in parties
    )
    return (Row(title, figure, "/s", floor), *cpu)


def _times(title: str, figure: str, floor: str = "") -> tuple[Row, ...]:
    return tuple(
        Row(f"{title}, {part}", f"{figure}, {part}", "ms", floor and f"{floor}, {part}") for part in ("p50", "p99")
    )


ALL = ("client", "replica", "server")
SMALL = ("100 B", "10 kB", "1 MB")

WORKLOADS = (
    Workload(
        "submit", "Bulk submit: `map_refs`, nobody takes any",
        _rate("requests that the server has", "submit", "client", "server", floor="floor submit"),
    ),
    Workload(
        "end_to_end", "End to end: submitted together, all results collected",
        (
            *_rate("`map` of the async handle", "map", *ALL, floor="floor map"),
            *_rate("`map` of the sync handle", "sync map", *ALL),
            Row("all under way at once", "", "/s", "floor all"),
        ),
    ),
    Workload(
        "callers", "Callers at the same time",
        tuple(Row(f"{number:,} of `call`", f"{number} callers", "/s", f"floor {number} callers") for number in (1, 64, 1_000)),
    ),
    Workload(
        "serial", "One request at a time",
        (
            *_times("async `call`", "call", "floor call"),
            *_times("sync `call`", "sync call"),
            *_times("`await (await remote(x))`", "remote"),
        ),
    ),
    Workload(
        "payloads", "Values there and back",
        (
            *(Row(f"bytes, {size}", f"bytes, {size}", "/s") for size in SMALL),
            *(Row(f"float64 array, {size}", f"array, {size}", "/s") for size in SMALL),
            Row("bytes, 50 MB", "bytes, 50 MB", "s"),
            Row("float64 array, 50 MB", "array, 50 MB", "s"),
            Row("redis-py's SET and GET of 50 MB", "bare, 50 MB", "s"),
            Row("bytes, 50 MB: times SET and GET", "bytes, 50 MB, times bare", "x"),
            Row("float64 array, 50 MB: times SET and GET", "array, 50 MB, times bare", "x"),
        ),
    ),
    Workload(
        "graphs", "Refs as arguments",
        (
            Row("chains of three, 64 callers", "chain", "/s"),
            *_times("one chain", "chain alone"),
            Row("ten refs into one call, 64 callers", "fan-in", "/s"),
            *_times("one such", "fan-in alone"),
        ),
    ),
    Workload(
        "streaming", "Streams",
        (*_rate("items of one stream", "items", *ALL), *_times("until the first item", "first item")),
    ),
    Workload(
        "sync_methods", "Methods that block, in a thread",
        (*_rate("`map`", "threads", *ALL), *_times("async `call`", "threads call")),
    ),
    Workload(
        "cpu_bound", "5 ms of pure Python each",
        (
            Row("one replica", "on 1", "/s"),
            Row("two replicas", "on 2", "/s"),
            Row("four replicas", "on 4", "/s"),
            Row("two replicas: times one", "on 2, speed-up", "x"),
            Row("four replicas: times one", "on 4, speed-up", "x"),
        ),
    ),
    Workload(
        "many_deployments", "Ten deployments alone, and beside so many at zero that they are a thousand",
        (
            Row("alone, 64 callers in turn", "alone", "/s"),
            Row("beside the others", "many", "/s"),
            *(
                Row(f"CPU of the {party} meanwhile, {how}", f"{name}, {party}", "%")
                for party in ("launcher", "autoscaler", "server")
                for name, how in (("alone", "alone"), ("many", "beside the others"))
            ),
            Row("until the others were deployed", "many, deploy", "s"),
        ),
        limit_s=600.0,
    ),
    Workload(
        "backlog", "A deep backlog",
        (
            Row("filling it, the first tenth", "filling, first", "/s"),
            Row("filling it, the last tenth", "filling, last", "/s"),
            Row("server memory per waiting request", "bytes per waiting request", "B"),
            Row("worked off", "worked off", "/s"),
            Row("worked off, the first tenth", "worked off, first", "/s"),
            Row("worked off, the last tenth", "worked off, last", "/s"),
            Row("worked off, 1,000 waiting", "worked off, shallow", "/s"),
        ),
        limit_s=900.0,
    ),
    Workload(
        "cold_start", "From zero replicas to a result",
        (
            Row("p50", "start", "ms"),
            Row("slowest", "start, slowest", "ms"),
            Row("the first since the application was deployed", "very first start", "ms"),
        ),
    ),
    Workload(
        "idle", "Nothing to do: CPU, in % of a core",
        (
            Row("launcher, autoscaler, warm parents and two replicas together", "idle", "%"),
            *(Row(party, f"idle, {party}", "%") for party in ("launcher", "autoscaler", "warm", "replica", "server")),
        ),
        limit_s=600.0,
    ),
    Workload(
        "memory", "Memory of a replica with eight siblings",
        (
            Row("PSS", "replica, pss", "MiB"),
            Row("private", "replica, private", "MiB"),
            Row("RSS, for reference", "replica, rss", "MiB"),
        ),
    ),
)  # fmt: skip


def chosen(names: str) -> list[Workload]:
    """The workloads of these names, with commas; all if there are none. Raises ValueError for one that is unknown."""
    known = {workload.name: workload for workload in WORKLOADS}
    if unknown := [name for name in names.split(",") if name and name not in known]:
        raise ValueError(f"unknown workload {unknown[0]!r}; known are {', '.join(known)}")
    return [known[name] for name in names.split(",") if name] or list(WORKLOADS)
