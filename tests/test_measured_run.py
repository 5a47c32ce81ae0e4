"""`moedist train` where nothing is written down of the placement: ranks are measured, and get what they can do."""

import json

import pytest

from moedist.coordinator.facts import facts_from_json
from moedist.placement import Plan, split_batch
from moedist.show_plan import show_plan
from tests.launching import ROOT, TINY, moedist, only_run

SLOWDOWN = [3.0, 3.0, 12.0]
MEASURED = ["configs/quickstart.yaml", *TINY, "placement.counts=null", "placement.batch_shares=null", "placement.probe_s=1.5",
            "model.width=64", "model.expert_hidden=128", "data.sequence_length=64", "train.batch=24", "phases=[{train: 4}]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("measured")
    done = moedist(3, cache, "train", *MEASURED, f"folder={folder}", f"world.slowdown={{0: {SLOWDOWN}}}",
                   "placement.replan_every=2")
    return only_run(folder), done.stdout


def test_what_was_measured_is_written_down(run):
    folder, out = run
    facts = facts_from_json((folder / "ranks.json").read_text())
    assert [f.rank for f in facts] == [0, 1, 2] and all(f.measured for f in facts)
    rows = [1000 / f.expert_rows_per_s + f.expert_call_s for f in facts]
    tokens = [1000 / f.dense_tokens_per_s + f.dense_call_s for f in facts]
    assert rows[2] > 1.5 * max(rows[:2]) and tokens[2] > 1.5 * max(tokens[:2])
    assert "expert rows/s" in out


def test_the_plan_gives_more_to_faster_ranks(run):
    folder, out = run
    lines = [json.loads(line) for line in (folder / "plans.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0 and [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    plan = Plan.from_json(json.dumps(lines[0]["plan"]))
    experts = [sum(len(layer.experts_of_rank(r)) for _, layer in plan.layers) for r in range(3)]
    sequences = split_batch(24, plan.batch_shares)
    assert sum(experts) == 16 and experts[2] < min(experts[:2]) and sequences[2] < min(sequences[:2])
    assert len(plan.speeds) == len(plan.predicted_ms) == 3 and plan.speeds[2] < min(plan.speeds[:2])
    assert f"{sequences[2]} of 24 sequences" in out
    assert len(lines) - 1 == out.count("re-plan: ")


def test_the_loads_are_in_the_checkpoint_to_plan_from(run, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder, _ = run
    meta = json.loads((folder / "checkpoints" / "step-00000004" / "meta.json").read_text())
    loads = meta["coordinator"]["loads"]
    assert sorted(loads) == ["0", "1"] and all(sum(load) == pytest.approx(24 * 64 * 2) for load in loads.values())
    show_plan(MEASURED[0], MEASURED[1:], "configs/clusters/mixed.yaml", 0.6, str(folder), None)
    out = capsys.readouterr().out
    assert f"loads of {folder}" in out and out.startswith("24 ranks")
