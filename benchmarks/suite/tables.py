"""What the rounds say: tables of medians, a plot, and the part of a page that shows both. Pure, but for the plot."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.peers.report import short, spread
from benchmarks.suite.workloads import Row, Workload

Rounds = list[dict[str, float]]

RATES = {
    "bulk submit": ("submit", "floor submit"),
    "map": ("map", "floor map"),
    "map, sync": ("sync map", ""),
    "64 callers": ("64 callers", "floor 64 callers"),
    "1,000 callers": ("1000 callers", "floor 1000 callers"),
    "sync methods": ("threads", ""),
    "items of a stream": ("items", ""),
}
TIMES = {
    "call": ("call, p50", "floor call, p50"),
    "call, sync": ("sync call, p50", ""),
    "remote, then ref": ("remote, p50", ""),
    "sync method": ("threads call, p50", ""),
    "first item": ("first item, p50", ""),
    "chain of three": ("chain alone, p50", ""),
    "ten refs": ("fan-in alone, p50", ""),
}


def markers(*, aof: bool) -> tuple[str, str]:
    """The two lines of a page between which the figures go; those of a durable server have a place of their own."""
    command = "benchmarks.suite --aof" if aof else "benchmarks.suite"
    return f"<!-- written by {command}: begin -->", f"<!-- written by {command}: end -->"


def cell(rounds: Rounds, figure: str, unit: str) -> str:
    """The median, and in brackets least and most if they differ; "-" for what was not measured."""
    if (found := spread(rounds, figure)) is None:
        return "-"
    median, least, most = map(short, found)
    text = f"{median}{unit if unit == '/s' else f' {unit}'}"
    return text if least == most else f"{text} ({least} - {most})"


def share(rounds: Rounds, row: Row) -> str:
    """Of the floor's rate."""
    ours, floors = spread(rounds, row.figure), spread(rounds, row.floor)
    return "-" if ours is None or floors is None or row.unit != "/s" else f"{ours[0] / floors[0]:.0%}"


def table(rounds: Rounds, rows: Iterable[Row]) -> str:
    """In markdown, without lines of which nothing was measured; with the floor where one of them has it."""
    rows = [row for row in rows if spread(rounds, row.figure) or spread(rounds, row.floor)]
    if not rows:
        return ""
    if not any(row.floor for row in rows):
        lines = ["| | |", "|---|---:|", *(f"| {row.title} | {cell(rounds, row.figure, row.unit)} |" for row in rows)]
    else:
        lines = ["| | millstream | the floor | of the floor |", "|---|---:|---:|---:|"]
        for row in rows:
            cells = (cell(rounds, row.figure, row.unit), cell(rounds, row.floor, row.unit), share(rounds, row))
            lines.append(f"| {row.title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def tables(rounds: Rounds, workloads: Iterable[Workload]) -> str:
    found = ((workload.title, table(rounds, workload.rows)) for workload in workloads)
    return "\n".join(f"**{title}**\n\n{text}" for title, text in found if text)


def section(rounds: Rounds, workloads: Iterable[Workload], about: dict[str, str], notes: Iterable[str]) -> str:
    """What the command writes into the page."""
    facts = ", ".join(f"{name} {value}" for name, value in about.items())
    left_out = "".join(f"\nLeft out: {note}\n" for note in notes)
    return f"{tables(rounds, workloads)}\nMeasured with {facts}.\n{left_out}"


def plot(rounds: Rounds, title: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "millstream"  # the same file for the same data
    from matplotlib import pyplot

    figure, (rates, times) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    _bars(rates, rounds, RATES)
    rates.set_xlabel("per second (more is better)")
    _bars(times, rounds, TIMES)
    times.set_xlabel("p50, ms (less is better)")
    figure.suptitle(title, fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _bars(axes: Any, rounds: Rounds, names: dict[str, tuple[str, str]]) -> None:
    """Ours and the floor's, with least and most as whiskers."""
    measured = {label: pair for label, pair in names.items() if spread(rounds, pair[0])}
    for side, (label, color) in enumerate((("millstream", "C0"), ("the floor", "lightgray"))):
        found = {row: spread(rounds, pair[side]) for row, pair in enumerate(measured.values())}
        for row, values in found.items():
            if values is not None:
                median, least, most = values
                axes.barh(
                    row + 0.4 * side, median, 0.4, color=color, xerr=[[median - least], [most - median]], ecolor="gray"
                )
        axes.barh([0], [0], color=color, label=label)
    axes.set_yticks([row + 0.2 for row in range(len(measured))], list(measured))
    axes.invert_yaxis()
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=8)
