"""The project's own benchmarks: what is pure in them, and one short run of two workloads."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers.report import with_section
from benchmarks.suite.backlog import rate
from benchmarks.suite.how import How
from benchmarks.suite.parties import memory_mib, party_of
from benchmarks.suite.run import in_words, measure, write_page
from benchmarks.suite.tables import cell, markers, plot, section, share, table
from benchmarks.suite.workloads import WORKLOADS, Row, Workload, chosen

BEGIN, END = markers(aof=False)
ROOT = Path(__file__).parents[2]
ROUNDS = [{"map": 10_000.0, "floor map": 50_000.0}, {"map": 30_000.0, "floor map": 40_000.0}, {"map": 20_000.0}]
MAP = Row("map", "map", "/s", floor="floor map")


def test_cell_has_the_median_and_in_brackets_least_and_most() -> None:
    assert cell(ROUNDS, "map", "/s") == "20,000/s (10,000 - 30,000)"
    assert cell(ROUNDS[:1], "map", "/s") == "10,000/s"
    assert cell([{"call": 0.25}], "call", "ms") == "0.25 ms"
    assert cell(ROUNDS, "call", "ms") == "-"


def test_share_of_the_floor_is_of_rates_only() -> None:
    assert share(ROUNDS, MAP) == "44%"
    assert share([{"call": 2.0, "floor call": 1.0}], Row("call", "call", "ms", "floor call")) == "-"
    assert share([{"map": 1.0}], MAP) == "-"


def test_table_leaves_out_what_was_not_measured_and_shows_the_floor_where_there_is_one() -> None:
    missing = Row("sync map", "sync map", "/s")

    assert table(ROUNDS[2:], [Row("map", "map", "/s"), missing]) == "| | |\n|---|---:|\n| map | 20,000/s |\n"
    assert table(ROUNDS[:1], [MAP, missing]) == (
        "| | millstream | the floor | of the floor |\n|---|---:|---:|---:|\n| map | 10,000/s | 50,000/s | 20% |\n"
    )
    assert table(ROUNDS, [missing]) == ""


def test_section_names_what_was_left_out_and_has_no_empty_tables() -> None:
    workloads = [Workload("a", "Of a", (MAP,)), Workload("b", "Of b", (Row("b", "b", "s"),))]

    text = section(ROUNDS, workloads, {"python": "3.11"}, ["b in round 2: it took more than 180 s"])

    assert "**Of a**" in text and "Of b" not in text
    assert "python 3.11" in text and "Left out: b in round 2" in text


def test_page_gets_tables_plot_and_a_link_to_the_rounds(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")

    for _ in range(2):
        write_page(page, "tables\n", tmp_path / "figures/bench.svg", tmp_path / "figures/bench.json")

    text = page.read_text()
    assert text.startswith(f"above\n{BEGIN}") and text.endswith(f"{END}\nbelow\n") and "old" not in text
    assert text.count("(figures/bench.svg)") == text.count("[bench.json](figures/bench.json)") == 1


def test_page_of_the_figures_has_a_place_for_those_of_each_kind_of_server() -> None:
    page = (ROOT / "docs/performance.md").read_text()

    once = with_section(page, "of one", *markers(aof=False))
    both = with_section(once, "of a durable one", *markers(aof=True))

    assert "of one\n" in both and "of a durable one\n" in both


def test_workloads_are_chosen_by_name_and_all_if_none_is_named() -> None:
    assert [workload.name for workload in chosen("serial,submit")] == ["serial", "submit"]
    assert chosen("") == list(WORKLOADS)
    with pytest.raises(ValueError, match=r"'sereal'.*serial"):
        chosen("sereal")


def test_every_workload_has_its_module_and_no_figure_has_two_lines() -> None:
    figures = [name for each in WORKLOADS for row in each.rows for name in (row.figure, row.floor) if name]

    assert len(figures) == len(set(figures))
    assert all(callable(importlib.import_module(f"benchmarks.suite.{each.name}").measure) for each in WORKLOADS)


def test_processes_are_known_by_their_titles() -> None:
    titles = {
        "millstream: launcher host-1a2b": "launcher",
        "millstream: autoscaler": "autoscaler",
        "millstream: warm default": "warm",
        "python -m millstream.replicas.warm 7": "warm",
        "millstream: default.NoOp r-3": "replica",
        "python -m benchmarks.floor.worker 6379": "other",
    }

    assert {title: party_of(title) for title in titles} == titles


def test_shared_pages_count_in_part_for_pss_and_not_as_private() -> None:
    memory = memory_mib(os.getpid())

    assert 0 < memory["private"] <= memory["pss"] <= memory["rss"]


def test_rate_of_working_off_is_from_the_first_that_ran_to_the_last() -> None:
    assert rate([10.0, 10.5, 11.0]) == 2.0


def test_figures_are_told_in_one_line() -> None:
    assert in_words({"map": 12_345.6, "call, p50": 0.25}) == "map 12,300; call, p50 0.25"
    assert in_words({}) == "nothing"


def test_plot_goes_without_what_was_not_measured(tmp_path: Path) -> None:
    plot([{"submit": 5.0, "map": 3.0, "floor map": 9.0}], "title", tmp_path / "bench.svg")

    assert "</svg>" in (tmp_path / "bench.svg").read_text()


@pytest.mark.processes
def test_workload_that_fails_says_why() -> None:
    figures, trouble = measure(Workload("no_such", "", ()), How())

    assert figures == {}
    assert "No module named 'benchmarks.suite.no_such'" in trouble


@pytest.mark.processes
def test_workload_that_takes_too_long_is_ended() -> None:
    figures, trouble = measure(Workload("idle", "", (), limit_s=0.5), How())

    assert figures == {}
    assert "more than 0 s" in trouble or "more than 1 s" in trouble


@pytest.mark.processes
def test_suite_measures_two_workloads_with_the_floor_beside(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.suite",
        "--only",
        "submit,serial",
        "--rounds",
        "1",
        "--seconds",
        "0.02",
    ]

    done = subprocess.run(
        [*command, "--json", tmp_path / "bench.json"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    (figures,) = found["rounds"]
    assert found["left out"] == [] and "cores" in found["environment"]
    assert {row.figure for each in chosen("submit,serial") for row in each.rows} <= figures.keys()
    assert all(
        figures[name] > 0 for name in ("submit", "floor submit", "call, p50", "sync call, p50", "floor call, p50")
    )
    assert "One request at a time" in done.stdout and "round 1 of 1: submit" in done.stderr
