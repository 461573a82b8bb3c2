"""The comparison with other queues: what is pure in it, and one short run of the floor."""

from pathlib import Path

import pytest

from benchmarks.floor.__main__ import figures
from benchmarks.peers.measure import LEAST, MOST, choose, quantiles
from benchmarks.peers.report import BEGIN, END, plot, section, short, spread, table, with_section
from benchmarks.peers.run import chosen, parse
from benchmarks.peers.systems import SYSTEMS, module

ROUNDS = {"a": [{"submit": 10.0}, {"submit": 30.0}, {"submit": 20.0}], "b": [{"async_p50_ms": 0.25}]}


def test_as_many_are_chosen_as_take_the_time_within_bounds() -> None:
    assert choose(100, 0.2, 1.0) == 500
    assert choose(1, 60.0, 1.0) == LEAST
    assert choose(100_000, 0.01, 1.0) == MOST


def test_quantiles_are_in_ms() -> None:
    assert quantiles([0.001] * 99 + [0.101]) == pytest.approx((1.0, 2.0))


def test_spread_is_median_least_and_most_of_what_was_measured() -> None:
    assert spread(ROUNDS["a"], "submit") == (20.0, 10.0, 30.0)
    assert spread([{}, *ROUNDS["b"]], "async_p50_ms") == (0.25, 0.25, 0.25)
    assert spread(ROUNDS["b"], "submit") is None


def test_numbers_have_three_digits_that_count() -> None:
    assert [short(value) for value in (67_123.0, 999.6, 12.34, 0.1284)] == ["67,100", "1000", "12.3", "0.128"]


def test_table_has_a_row_for_each_system_and_a_dash_for_what_it_cannot_do() -> None:
    assert table(ROUNDS, ["submit", "async_p50_ms"]) == (
        "| System | Bulk submit, /s | Serial p50, ms |\n|---|---:|---:|\n| a | 20 (10 - 30) | - |\n| b | - | 0.25 |\n"
    )


def test_section_replaces_what_is_between_the_markers_and_nothing_else() -> None:
    text = section(ROUNDS, {"python": "3.11"}, ["c: it needs Python 3.12"])

    once = with_section(f"above\n{BEGIN}\nold\n{END}\nbelow\n", text)

    assert with_section(once, text) == once
    assert once.startswith(f"above\n{BEGIN}") and once.endswith(f"{END}\nbelow\n")
    assert "old" not in once and "Left out: c: it needs Python 3.12" in once and "python 3.11" in once


def test_page_without_markers_is_left_alone() -> None:
    with pytest.raises(ValueError, match="begin"):
        with_section(f"{END} {BEGIN}", "text")


def test_page_of_the_benchmarks_has_the_markers() -> None:
    page = (Path(__file__).parents[2] / "docs/benchmarks.md").read_text()

    assert with_section(page, "text").count("text\n") >= 1


def test_figures_are_found_among_what_libraries_print() -> None:
    assert parse('a banner\n{"submit": 5}\n{"callers": 7.5}\n') == {"submit": 5, "callers": 7.5}


def test_systems_are_chosen_by_name_and_all_if_none_is_named() -> None:
    assert [system.name for system in chosen("saq,floor")] == ["saq", "floor"]
    assert chosen("") == list(SYSTEMS)
    with pytest.raises(ValueError, match=r"'sidekiq'.*millstream"):
        chosen("floor,sidekiq")


def test_every_system_has_its_module_and_pins_its_packages() -> None:
    for system in SYSTEMS:
        assert (Path(__file__).parents[2] / f"{module(system.name).replace('.', '/')}.py").exists()
        assert all("==" in package for package in system.packages)


def test_plot_goes_without_what_was_not_measured(tmp_path: Path) -> None:
    plot(ROUNDS, "title", tmp_path / "peers.svg")

    assert "</svg>" in (tmp_path / "peers.svg").read_text()


@pytest.mark.processes
def test_floor_runs_every_workload_on_a_server_of_its_own() -> None:
    measured = figures(seconds=0.02)

    assert {"submit", "end_to_end", "callers", "async_p50_ms", "async_p99_ms", "1 MB"} <= measured.keys()
    assert {"client_us", "worker_us", "server_us"} <= measured.keys()
    assert all(measured[name] > 0 for name in ("submit", "end_to_end", "callers", "async_p50_ms"))
