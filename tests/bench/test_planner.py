"""The planner bench runs, and its figures are ordered as methods are good."""

import json

import pytest

from moedist.bench.planner import GRID, QUICK, Point, bench_planner, zipf_problem
from moedist.cli import main


def test_quick_figures(tmp_path, capsys):
    figures = bench_planner(True, str(tmp_path / "f.json"))
    assert json.loads((tmp_path / "f.json").read_text()) == figures
    for point in QUICK:
        full, searched, lpt = (figures[f"{point.figure}.{name}over_bound"] for name in ("", "lpt_search_", "lpt_"))
        assert 1 - 1e-6 <= full <= searched + 0.005  # the full plan may spend 0.5 % of the bound on fewer copies
        assert searched <= lpt + 1e-9
        assert full <= figures[f"{point.figure}.equal_over_bound"]
        assert 0 <= figures[f"{point.figure}.copies"] <= point.ranks - 1
        assert figures[f"{point.figure}.ms_per_layer"] > 0
    for skew in ("0.6", "1.2"):
        assert figures[f"planner.r16.e64.s8.z{skew}.over_bound"] <= 1.02
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(QUICK)


def test_the_figures_that_count_are_in_the_full_grid():
    names = {point.figure for point in GRID}
    assert {"planner.r16.e64.s8.z0.6", "planner.r16.e64.s8.z1.2", "planner.r1024.e256.s8.z1.2"} <= names


def test_problems_are_as_named():
    problem = zipf_problem(Point(16, 64, 8, 1.2), 0)
    assert max(problem.speeds) == pytest.approx(8 * min(problem.speeds))
    assert max(problem.loads) == pytest.approx(64**1.2 * min(problem.loads))
    assert problem == zipf_problem(Point(16, 64, 8, 1.2), 0) != zipf_problem(Point(16, 64, 8, 1.2), 1)


def test_command_line(tmp_path, capsys):
    main(["bench", "planner", "--quick", "--json", str(tmp_path / "f.json")])
    assert "planner.r4.e8.s8.z0.6.over_bound" in json.loads((tmp_path / "f.json").read_text())
    assert "ms a layer" in capsys.readouterr().out
