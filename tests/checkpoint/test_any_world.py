"""Saved by two ranks, compressed or not; gone on with by one, two and three: logits bitwise equal, then the same losses."""

from pathlib import Path

import pytest
import torch

from moedist.checkpoint import RunFolder
from moedist.config import check_config, config_from_dict, for_ranks
from moedist.coordinator import written_plan
from moedist.model import Batch
from moedist.phases.compress import compress_phase
from moedist.phases.train import train_step
from moedist.trainer import build_run, resumed_run
from tests.ranks import run_ranks

CONFIG = {
    "name": "matrix", "data": {"tokenizer": "byte", "sequence_length": 32, "max_documents": 60},
    "model": {"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "experts": 6, "top_k": 2, "expert_hidden": 24},
    "train": {"batch": 6, "lr": 1e-3, "warmup_steps": 2, "eval_tokens": 256, "eps": 1e-5, "dtype": "float64"},
    "phases": [{"train": 20}], "monitor": {"wandb": "disabled"}, "world": {"device": "cpu"},
}
PLACED = {1: {}, 2: {"counts": [5, 1], "batch_shares": [1, 2]}, 3: {"counts": [0, 2, 4], "batch_shares": [3, 1, 2]}}


def next_steps(run) -> tuple[torch.Tensor, list[float]]:
    """Logits of 64 tokens on rank 0, the others having none, then the losses of the next five steps."""
    run.model.eval()
    ids = torch.arange(64).view(2, 32)[:2 if run.world.is_main else 0] % 250
    with torch.no_grad():
        hidden, _ = run.model(Batch(ids, ids, 0))
        logits = hidden @ run.model.head_weight.t()
    run.model.train()
    losses = [train_step(run).sums["loss"] for _ in range(5)]
    assert run.finish_saving() is None
    run.recorder.close()
    return logits, losses


def train_and_save(world, folder, cache, compressed):
    torch.set_num_threads(1)
    config = config_from_dict({**CONFIG, "folder": str(folder), "placement": {**PLACED[world.size], "planner": "equal"},
                               "data": {**CONFIG["data"], "cache": str(cache)}})
    run = build_run(config, world, written_plan(config, world.size, None)[0])
    for _ in range(4):
        train_step(run)
    if compressed:
        compress_phase(run, {"method": "cur", "ratio": 0.5, "tokens": 512, "options": {"multiple": 1}})
        run.progress.phase = 0  # the schedule of this test is one train phase
        run.save(again=True)
    else:
        run.save(periodic=True)
    logits, losses = next_steps(run)  # while the checkpoint is written, where it is not compressed
    return str(run.folder), logits, losses


def go_on(world, folder):
    config, _ = for_ranks(RunFolder(folder).config([f"placement={PLACED[world.size]}"]), world.size)
    check_config(config, world.size)
    run = resumed_run(config, world, RunFolder(folder))
    assert run.progress.step == 4
    return next_steps(run)


@pytest.mark.parametrize("compressed", [False, True])
def test_any_world_goes_on_where_two_ranks_stopped(tmp_path, cache, compressed):
    written = run_ranks(2, train_and_save, tmp_path, cache, compressed)
    folder, logits, losses = written[0]
    assert any(Path(folder).glob("compression-*.json")) == compressed and len(set(losses)) == 5
    for size in (1, 2, 3):
        found = run_ranks(size, go_on, folder)
        assert torch.equal(found[0][0], logits), f"{size} ranks compute other logits"
        for _, of_rank in found:
            assert of_rank == pytest.approx(losses, rel=1e-9), size
