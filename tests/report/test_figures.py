"""Figures and what they are made of, without a browser."""

import json

import plotly.graph_objects
import pytest

from moedist.errors import CheckpointError
from moedist.placement import LayerPlan, Plan
from moedist.report import read_run
from moedist.report.figures import details, log_ticks, overview
from moedist.report.page import in_script
from tests.launching import moedist


def write_run(folder, records, plans=(), ranks=2):
    """A run folder of numbers."""
    folder.mkdir()
    (folder / "config.yaml").write_text("train: {batch: 4}\ndata: {sequence_length: 10}\nphases: [{train: 100}]\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "plans.jsonl").write_text("".join(f'{{"step":{step},"plan":{plan.to_json()}}}\n' for step, plan in plans))
    return folder


def plan(*owners):
    return Plan(2, ((1, LayerPlan(owners, tuple((1 / len(o),) * len(o) for o in owners))),), (1.0, 1.0))


def test_plotly_accepts_every_figure(watched):
    run = read_run(watched)
    plots = overview([run]) + details(run)
    assert len({plot.id for plot in plots}) == len(plots) == 12
    for plot in plots:
        plotly.graph_objects.Figure(plot.figure)  # refuses what Plotly does not know


def test_plans_that_a_resumed_run_took_back_are_forgotten(tmp_path):
    a, b, c = plan((0,), (0,)), plan((0,), (1,)), plan((0, 1), (1,))
    run = read_run(write_run(tmp_path / "r", [{"step": 1, "train/loss": 1.0}], [(0, a), (40, b), (80, c), (60, b), (70, a)]))
    assert [(step, p.sha256) for step, p in run.plans] == [(0, a.sha256), (40, b.sha256), (70, a.sha256)]
    assert run.replans() == [40, 70]
    (found,) = [plot.figure["data"] for plot in details(run) if plot.id == "plan"]
    assert [trace["z"] for trace in found] == [[[0, 0]], [[0, 0]]] and found[1]["meta"] == 70


def test_many_ranks_are_bars_of_quantiles(tmp_path):
    record = {"step": 5, **{f"rank/p{q}/{name}": float(q) for q in (0, 10, 50, 90, 100)
                            for name in ("expert_ms", "dense_ms", "all_to_all_ms", "wait_ms", "rows", "rows_per_s")}}
    found = {plot.id: plot.figure for plot in details(read_run(write_run(tmp_path / "r", [record])))}
    assert found["ranks"]["data"][0]["x"] == [0, 10, 50, 90, 100]
    assert found["ranks"]["data"][0]["y"][1] == "10 % of ranks" and "shares" not in found


def test_what_is_not_finite_is_left_out(tmp_path):
    run = read_run(write_run(tmp_path / "r", [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": None},
                                              {"step": 2, "alert": "not finite", "text": "layer 3"}]))
    assert run.series("train/loss").values == [2.0] and run.series("train/loss").tokens == [40.0]
    assert run.alerts[0]["text"] == "layer 3" and run.step == 2


def test_ticks_of_a_logarithmic_axis():
    assert log_ticks([15, 120]) == [10, 20, 50, 100, 200] and log_ticks([0.3]) == [0.2, 0.5] and log_ticks([]) == []
    assert log_ticks([1, 10]) == [1, 2, 5, 10]


def test_json_cannot_end_its_script():
    assert "<" not in in_script({"name": "</script><script>alert(1)"})
    with pytest.raises(ValueError, match="JSON compliant"):
        in_script({"value": float("nan")})


def test_errors_and_the_command(tmp_path, cache):
    with pytest.raises(CheckpointError, match="not a run folder"):
        read_run(tmp_path)
    with pytest.raises(CheckpointError, match="no metrics yet"):
        read_run(write_run(tmp_path / "empty", []))
    done = moedist(1, cache, "report", str(tmp_path / "empty"), ok=False)
    assert "moedist: error:" in done.stderr and "no metrics yet" in done.stderr
    run = write_run(tmp_path / "r", [{"step": 1, "train/loss": 2.0}])
    moedist(1, cache, "report", str(run))
    text = (run / "report.html").read_text()
    assert 4e6 < len(text) < 6e6 and 'id="plot-loss"' in text
