"""Balancing by speed on four real ranks: the expert phase comes near the bound and no expert moves."""

import json

import numpy as np
import pytest

from moedist.bench.balance import SPEEDS, bench_balance, rows_in_place, rows_over_bound
from moedist.checkpoint import read_meta
from moedist.config import config_from_dict
from moedist.coordinator import written_plan
from moedist.errors import ConfigError, MoedistError
from moedist.phases.train import train_step
from moedist.placement import Plan
from moedist.trainer import build_run
from tests.launching import moedist
from tests.ranks import run_ranks

STEPS, LAST = 110, 20
TREE = {"data": {"tokenizer": "byte", "sequence_length": 64, "max_documents": 150},
        # clear preferences from the start: a router that has learned nothing sends tokens elsewhere every few steps
        "model": {"layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "experts": 16, "top_k": 2, "expert_hidden": 8,
                  "init_std": 0.5},
        "train": {"batch": 128, "lr": 1e-3, "eval_tokens": 64}, "monitor": {"wandb": "disabled", "output": "quiet"},
        "router": {"balance_loss": 0.0, "bias_rate": 0.01, "bias_rule": "proportional", "balance_to": "speed"},
        "placement": {"counts": [4, 4, 4, 4], "speeds": list(SPEEDS), "replan_every": 25}, "phases": [{"train": STEPS}]}


def balanced(world, folder, cache):
    """Rows of every rank in each step, balance, the plan at the end, and whether a run that goes on has targets and bias."""
    config = config_from_dict(TREE, [f"folder={folder}", f"data.cache={cache}"])
    written = written_plan(config, world.size, None)[0]
    run = build_run(config, world, written)
    reports, said = [], []
    run.recorder.say = said.append
    for _ in range(STEPS):
        reports.append(train_step(run))
        run.replan(reports[-1].loads, reports[-1].ranks, bool(reports[-1].sums["plan"]))
    run.save()
    path = run.folder.checkpoint(STEPS)
    meta = read_meta(path)
    again = build_run(config, world, written, run.folder, path, meta)
    (_, before), (_, after) = next(run.model.moe_layers()), next(again.model.moe_layers())
    kept = (before.router.targets_E.equal(after.router.targets_E), before.router.bias.equal(after.router.bias))
    return ([r.ranks.rows[0] for r in reports], rows_over_bound(reports[-LAST:], SPEEDS), rows_in_place(reports[-LAST:]),
            run.plan.to_json(), meta["plan"], kept, said)


def test_loads_come_to_speeds_and_experts_stay(tmp_path, cache):
    found = run_ranks(4, balanced, str(tmp_path), str(cache))
    rows, each_step, balance, plan, saved, kept, said = found[0]
    plan = Plan.from_json(plan)
    assert [len(plan.layer(0).experts_of_rank(r)) for r in range(4)] == [4] * 4 and not [s for s in said if "re-plan" in s]
    assert plan.layer(0).targets == pytest.approx(np.repeat([4 / 32, 2 / 32, 1 / 32, 1 / 32], 4))
    assert len({of_rank[3] for of_rank in found}) == 1 and saved == found[0][3] and kept == (True, True)
    rows_W = np.sum(rows[-LAST:], axis=0)
    assert (rows_W / SPEEDS).max() / (rows_W.sum() / sum(SPEEDS)) < 1.05
    assert each_step < 1.08  # with the chance of single batches
    first_W = np.sum(rows[:5], axis=0)
    assert (first_W / SPEEDS).max() / (first_W.sum() / sum(SPEEDS)) > 1.5
    assert balance < 0.8  # experts have the loads of their ranks, not equal ones


@pytest.mark.timeout(600)  # it starts four ranks, which read text
def test_it_starts_its_ranks_and_writes_the_figures(tmp_path, cache):
    out = tmp_path / "balance.json"
    done = moedist(1, cache, "bench", "balance", "router.bias_in=logits", "--steps", "10", "--timed", "10", "--rate", "0.05",
                   "--seeds", "3", "4", "--json", str(out))
    figures = {name.removeprefix("balance.4211."): value for name, value in json.loads(out.read_text()).items()}
    assert all(figures[f"{side}.rows_over_bound"] > 1 and 0 < figures[f"{side}.rows_in_place"] < 1 and
               1 < figures[f"{side}.perplexity"] < 257 for side in ("loss", "bias", "speed"))
    assert all(figures[f"{side}.timed_over_bound"] > 1 for side in ("bias", "speed")) and "loss.timed_over_bound" not in figures
    said = [line.split(":")[0] for line in done.stdout.splitlines() if ": loss.rows_over_bound " in line]
    assert said == ["seed 3", "seed 4"]


@pytest.mark.parametrize("override, words", [("router.bias_rat=1", "bias_rate"), ("model.top_k=17", "17")])
def test_overrides_that_cannot_be_are_refused_before_ranks_start(monkeypatch, override, words):
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("ranks were started"))
    with pytest.raises(ConfigError, match=words):
        bench_balance(5, 0, 0.001, None, overrides=[override])


def test_a_number_of_ranks_that_it_does_not_play_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(MoedistError, match="plays 4 ranks but was started on 3"):
        bench_balance(5, 0, 0.001, None)
