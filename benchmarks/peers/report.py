"""What the rounds say: a table of medians, plots, and the part of a page that shows both. Pure, but for the plots."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Rounds = dict[str, list[dict[str, float]]]  # of each system

COLUMNS = {
    "submit": "Bulk submit, /s",
    "end_to_end": "End to end, /s",
    "callers": "64 callers, /s",
    "async_p50_ms": "Serial p50, ms",
    "async_p99_ms": "p99, ms",
    "sync_p50_ms": "Blocking serial p50, ms",
    "sync_p99_ms": "p99, ms",
    "100 B": "100 B, /s",
    "10 kB": "10 kB, /s",
    "1 MB": "1 MB, /s",
    "client_us": "Client, µs",
    "worker_us": "Worker, µs",
    "server_us": "Server, µs",
}
RATES = ("submit", "end_to_end", "callers")
TIMES = ("async_p50_ms", "async_p99_ms", "sync_p50_ms", "sync_p99_ms")
CPU = ("client_us", "worker_us", "server_us")
ECHOES = ("100 B", "10 kB", "1 MB")
BEGIN, END = "<!-- written by benchmarks.peers: begin -->", "<!-- written by benchmarks.peers: end -->"


def spread(rounds: Iterable[dict[str, float]], name: str) -> tuple[float, float, float] | None:
    """Median, least and most; None: it was never measured."""
    values = [figures[name] for figures in rounds if name in figures]
    return (statistics.median(values), min(values), max(values)) if values else None


def short(value: float) -> str:
    """Three digits that count."""
    if value >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def cell(rounds: Iterable[dict[str, float]], name: str) -> str:
    if (found := spread(rounds, name)) is None:
        return "-"
    median, least, most = map(short, found)
    return median if least == most else f"{median} ({least} - {most})"


def table(results: Rounds, names: Iterable[str]) -> str:
    """In markdown, a row for each system: medians, and in brackets least and most."""
    names = list(names)
    head = " | ".join(["System", *(COLUMNS[name] for name in names)])
    rows = [f"| {head} |", "|---|" + "---:|" * len(names)]
    for system, rounds in results.items():
        rows.append(f"| {' | '.join([system, *(cell(rounds, name) for name in names)])} |")
    return "\n".join(rows) + "\n"


def tables(results: Rounds) -> str:
    parts = {
        "Requests per second": RATES,
        "One request at a time": TIMES,
        "CPU time per request, end to end": CPU,
        "Values of some size, there and back": ECHOES,
    }
    return "\n".join(f"**{title}**\n\n{table(results, names)}" for title, names in parts.items())


def section(results: Rounds, about: dict[str, str], notes: Iterable[str]) -> str:
    """What the command writes into the page."""
    facts = ", ".join(f"{name} {value}" for name, value in about.items())
    left_out = "".join(f"\nLeft out: {note}\n" for note in notes)
    return f"{tables(results)}\nMeasured with {facts}.\n{left_out}"


def with_section(page: str, text: str, first: str = BEGIN, last: str = END) -> str:
    """The page with this between the two markers. Raises ValueError if they are not there, in their order."""
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the page has no lines {first!r} and, below, {last!r}")
    return f"{before}{first}\n\n{text}\n{last}{after}"


def plot(results: Rounds, title: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "millstream"  # the same file for the same data
    from matplotlib import pyplot

    figure, (rates, times) = pyplot.subplots(1, 2, figsize=(11, 1.5 + 0.5 * len(results)))
    _bars(rates, results, {"submit": "bulk submit", "end_to_end": "end to end", "callers": "64 callers"})
    rates.set_xlabel("requests/s (log scale; more is better)")
    _bars(times, results, {"async_p50_ms": "event loop", "sync_p50_ms": "blocking"})
    times.set_xlabel("serial p50, ms (log scale; less is better)")
    figure.suptitle(title, fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _bars(axes: Any, results: Rounds, series: dict[str, str]) -> None:
    height = 0.8 / len(series)
    for index, (name, label) in enumerate(series.items()):
        found = {row: spread(rounds, name) for row, rounds in enumerate(results.values())}
        shown = {row: median for row, (median, *_) in ((r, f) for r, f in found.items() if f is not None)}
        axes.barh([row + index * height for row in shown], list(shown.values()), height, label=label)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(results))], list(results))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(series), frameon=False, fontsize=8)
