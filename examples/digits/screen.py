"""How the demo looks: a live view in a terminal, a line every other second elsewhere, and the summary."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from examples.digits.day import Day, Look
from millstream.serve import DeploymentStatus

LINE_EVERY_S = 2.0  # where there is no terminal to draw on
WAY_BACK_S = 18.0  # room in the live chart for the way back to zero
WIDTH, CHART_WIDTH, BAR_WIDTH = 80, 63, 24  # fits the smallest terminal in use
LEAST_LEVELS = 6  # a chart that grows in height would make the view jump
# A colour and a shade for each deployment, in the order of the graph: readable without colours, too.
STYLES = (("cyan", "░"), ("magenta", "▒"), ("green", "█"))
REPLICA_SIGNS = {"STARTING": ("◌", "yellow"), "RUNNING": ("●", "green"), "DRAINING": ("○", "dim")}
EIGHTHS = " ▁▂▃▄▅▆▇█"


class Screen:
    """Where the demo speaks. `show` belongs inside `live()`."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._live: Live | None = None
        self._next_line_s = 0.0

    def say(self, text: str) -> None:
        self._console.print(text, style="dim")

    @contextmanager
    def live(self) -> Iterator[None]:
        """Draw in place while this is open. The view leaves nothing behind: the summary takes its place."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as self._live:
            yield

    def show(self, day: Day) -> None:
        if self._live is not None:
            self._live.update(live_view(day), refresh=True)
        elif day.now_s() >= self._next_line_s:
            self._next_line_s = day.now_s() + LINE_EVERY_S
            self._console.print(line(day), soft_wrap=True)

    def summarise(self, day: Day) -> None:
        self._console.print(summary(day))


def live_view(day: Day) -> RenderableType:
    end_s = max(day.seconds + WAY_BACK_S, day.looks[-1].at_s)
    return _framed(_deployments(day), "", chart(day, end_s), "", _progress(day))


def summary(day: Day) -> RenderableType:
    return _framed(chart(day, day.looks[-1].at_s), "", _facts(day))


def line(day: Day) -> str:
    """The live view for those who only have a log."""
    now = day.looks[-1]
    replicas = ", ".join(f"{name} {count}" for name, count in now.replicas.items())
    return f"{now.at_s:4.0f} s   {day.answered:,} of {day.requests:,} answered, {now.waiting:,} waiting   replicas: {replicas}"


def _framed(*parts: RenderableType) -> RenderableType:
    return Padding(Group(*parts), (1, 0, 1, 2))


def _deployments(day: Day) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    table.add_column("deployment", width=10)
    table.add_column("replicas", width=9)
    table.add_column("in flight", justify="right")
    table.add_column("waiting", justify="right")
    table.add_column(width=BAR_WIDTH)
    most = max(50, *(one.waiting for look in day.looks for one in look.status.deployments.values()))
    for (name, now), (colour, _) in zip(day.looks[-1].status.deployments.items(), STYLES, strict=True):
        bar = Text(_bar(now.waiting / most), style=colour)
        table.add_row(Text(name, style=colour), _replicas(now), f"{now.in_flight:,}", f"{now.waiting:,}", bar)
    return table


def _replicas(status: DeploymentStatus) -> Text:
    signs = [REPLICA_SIGNS.get(replica.state, ("?", "red")) for replica in status.replicas]
    return Text(" ").join(Text(*sign) for sign in signs) if signs else Text("none", style="dim")


def _bar(share: float) -> str:
    whole, rest = divmod(round(share * BAR_WIDTH * 8), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[rest]


def _progress(day: Day) -> Group:
    said = [f"{day.now_s():.0f} s", f"{day.answered:,} of {day.requests:,} answered"]
    if day.answered:
        said += [f"{day.requests_per_s:.0f}/s", f"{day.accuracy:.1%} correct"]
    else:
        said += ["the first ones wait for their replicas"]
    if day.answered == day.requests:
        said += ["going back to zero"]
    bar = Table.grid()  # of its own a bar does not end its line
    bar.add_row(ProgressBar(day.requests, day.answered, width=WIDTH - 4))
    return Group(bar, Text(" · ".join(said), style="dim"))


def chart(day: Day, end_s: float) -> Group:
    """Replicas over time, one cell for each, and below it what was waiting: the effect above its cause."""
    columns = _columns(day, end_s)
    names = list(day.looks[-1].replicas)
    levels = range(max(LEAST_LEVELS, day.most_replicas), 0, -1)
    ruler = Text(f"{'0':>12}{f'{end_s:.0f} s':>{CHART_WIDTH - 1}}", style="dim")
    return Group(
        *[_level(level, levels[0], columns, names) for level in levels], _waiting(columns), ruler, _legend(names)
    )


def _columns(day: Day, end_s: float) -> list[Look | None]:
    """The latest look within each column's time, or the one before it; None in the future."""
    columns: list[Look | None] = [None] * CHART_WIDTH
    for look in day.looks:
        columns[min(CHART_WIDTH - 1, int(look.at_s / end_s * CHART_WIDTH))] = look
    for i in range(1, columns.index(day.looks[-1])):
        columns[i] = columns[i] or columns[i - 1]
    return columns


def _level(level: int, highest: int, columns: list[Look | None], names: list[str]) -> Text:
    row = Text(f"{'replicas' if level == highest else '':8} {level} ", style="dim")
    for look in columns:
        owner = _owner(level, look.replicas) if look else None
        colour, sign = STYLES[names.index(owner)] if owner else ("", " ")
        row.append(sign, style=f"not dim {colour}")
    return row


def _owner(level: int, replicas: dict[str, int]) -> str | None:
    """Whose is the `level`-th cell from below?"""
    for name, count in replicas.items():
        level -= count
        if level <= 0:
            return name
    return None


def _waiting(columns: list[Look | None]) -> Text:
    waiting = [look.waiting if look else 0 for look in columns]
    most = max(1, *waiting)
    return Text("waiting    ", style="dim").append(
        "".join(EIGHTHS[-(-8 * count // most)] for count in waiting), style="not dim blue"
    )


def _legend(names: list[str]) -> Text:
    legend = Text(" " * 11)
    for name, (colour, sign) in zip(names, STYLES, strict=True):
        legend.append(f"{sign} {name}   ", style=colour)
    return legend


def _facts(day: Day) -> Table:
    facts = Table.grid(padding=(0, 3, 0, 0))
    facts.add_column(style="dim")
    facts.add_column(justify="right", style="bold")
    facts.add_column(style="dim")
    facts.add_row("answers", f"{day.answered:,}", f"{day.accuracy:.1%} correct")
    facts.add_row("throughput", f"{day.requests_per_s:.0f}/s", "each through three deployments")
    facts.add_row("latency p50", f"{day.percentile_s(50) * 1000:,.0f} ms")
    facts.add_row(
        "latency p99", f"{day.percentile_s(99) * 1000:,.0f} ms", f"{day.latencies_s[0]:.1f} s for the first, from zero"
    )
    facts.add_row("replicas", f"0 → {day.most_replicas} → {sum(day.looks[-1].replicas.values())}")
    facts.add_row("waiting", f"{day.most_waiting:,}", "at most")
    return facts
