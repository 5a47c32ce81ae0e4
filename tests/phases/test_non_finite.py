"""A value that is not finite is planted in one expert on one rank: where it is, is told, and what follows is as configured."""

import json
import math

import pytest
import torch

from moedist.config import config_from_dict
from moedist.coordinator import written_plan
from moedist.errors import MoedistError
from moedist.phases.non_finite import Origin
from moedist.phases.train import train_phase
from moedist.trainer import build_run
from tests.ranks import run_ranks

LAYER, EXPERT, RANK, PLANTED_AFTER = 1, 6, 1, 4
TREE = {"data": {"tokenizer": "byte", "sequence_length": 16, "max_documents": 150},
        "model": {"layers": 3, "width": 16, "heads": 2, "kv_heads": 1, "experts": 8, "top_k": 2, "expert_hidden": 8},
        "train": {"batch": 8, "eval_every": 0, "eval_tokens": 64}, "placement": {"counts": [5, 3]}, "checkpoint": {"every": 2},
        "monitor": {"wandb": "disabled", "log_every": 1, "output": "quiet"}, "phases": [{"train": 8}]}


def poison(run, what):
    """Spoil expert `EXPERT` of layer `LAYER`, on the rank that has it, from here on."""
    bank = run.model.banks[LAYER]
    if EXPERT not in bank.expert_ids:
        return
    if what == "weights":
        bank.split(EXPERT, bank.weights())["w2"][3, 1] = math.nan
    else:  # values are fine, one gradient is not
        p = next(p for p in bank.parameters())
        p.register_hook(lambda grad: torch.full_like(grad, math.inf))


def train_poisoned(world, folder, cache, what, overrides):
    """(error or None, step, whether all weights but the planted one are finite, checkpoints)."""
    config = config_from_dict(TREE, [f"folder={folder}", f"data.cache={cache}", *overrides])
    run = build_run(config, world, written_plan(config, world.size, None)[0])
    train_phase(run, PLANTED_AFTER)
    poison(run, what)
    error = None
    try:
        train_phase(run, 8)
    except MoedistError as raised:
        error = str(raised)
    run.finish_saving()
    run.recorder.close()
    bad = sum(int((~torch.isfinite(t)).sum()) for t in run.model.named_state().values())
    return error, run.progress.step, world.all_reduce_(torch.tensor([bad])).item(), run.folder.steps(), str(run.folder)


def alerts_of(folder):
    lines = map(json.loads, open(f"{folder}/metrics.jsonl", encoding="utf-8"))
    return [line for line in lines if line.get("alert") == "not finite"]


@pytest.mark.parametrize("engine", [[], ["engine.name=deepspeed"]])
def test_a_nan_in_one_expert_is_told_and_the_run_stops(tmp_path, cache, engine):
    found = run_ranks(2, train_poisoned, str(tmp_path), str(cache), "weights", engine)
    for error, step, bad, steps, folder in found:
        assert step == PLANTED_AFTER + 1 and bad == 1  # nothing else has been spoilt
        assert steps[-1] == PLANTED_AFTER
        assert f"step {step}: " in error and f"layer {LAYER}, expert {EXPERT} on rank {RANK} (" in error
        assert "whose weights w2 are not finite" in error and f"the last checkpoint is of step {PLANTED_AFTER}" in error
    (alert,) = alerts_of(found[0][4])
    assert alert["step"] == PLANTED_AFTER + 1 and f"layer {LAYER}, expert {EXPERT} on rank {RANK} (" in alert["text"]


def test_steps_are_skipped_where_that_is_configured(tmp_path, cache):
    found = run_ranks(2, train_poisoned, str(tmp_path), str(cache), "weights",
                      ["monitor.on_non_finite=skip", "monitor.max_skips=2", "checkpoint.every=0"])
    for error, step, bad, _, folder in found:
        # two are skipped, the third in a row is one too many
        assert step == PLANTED_AFTER + 3 and bad == 1 and "2 steps before were skipped" in error
    assert [alert["step"] for alert in alerts_of(found[0][4])] == [PLANTED_AFTER + i for i in (1, 2, 3)]
    skipped = [line["train/skipped_steps"] for line in map(json.loads, open(f"{found[0][4]}/metrics.jsonl"))
               if "train/skipped_steps" in line]
    assert skipped == [0] * 4 + [1, 2]


def test_a_gradient_that_is_not_finite_is_found_too(tmp_path, cache):
    for error, step, bad, steps, _ in run_ranks(2, train_poisoned, str(tmp_path), str(cache), "gradients", []):
        assert step == PLANTED_AFTER + 1 and bad == 0 and steps[-1] == PLANTED_AFTER
        assert f"layer {LAYER}, expert " in error and f" on rank {RANK} (" in error


@pytest.mark.parametrize("origin, words", [
    (Origin((1, 2), 1, 1, 5, "experts", ("w1",)), "first not finite in layer 1, expert 5 on rank 1, whose weights w1 are not"),
    (Origin((1, 0), 0, 1, -1, "attention"), "first not finite in layer 1, attention on rank 0"),
    (Origin((4, 0), 2, part="the loss"), "first not finite in the loss on rank 2"),
    (Origin((0, 0), 0), "it came up in gradients or optimizer state")])
def test_where_in_words(origin, words):
    assert words in origin.describe(lambda rank: f"rank {rank}")
