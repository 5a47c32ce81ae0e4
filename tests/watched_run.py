"""One run of 30 steps on two ranks with everything on, that several tests look at."""

from __future__ import annotations

from pathlib import Path

from tests.launching import TINY, moedist, only_run

STEPS = 30


def watched_run(folder: Path, cache: Path) -> Path:
    """Train it: two islands of one rank, measured, compressed on the way, evaluated twice; Weights & Biases offline."""
    moedist(2, cache, "train", "configs/quickstart.yaml", *TINY, f"folder={folder}", "name=watched", "data.max_documents=150",
            "phases=[{train: 20}, {compress: {method: cur, ratio: 0.5, tokens: 512}}, {train: 10}]",
            "model.top_k=2", "train.eval_every=10", "monitor.log_every=5", "monitor.wandb=offline", "monitor.wandb_ranks=true",
            "monitor.artifacts=true", "monitor.profile=12-13", "placement.probe_s=0.5", "placement.replan_every=0",
            "checkpoint.every=10", "world.islands=[a,b]", "dispatch.cross_dtype=bfloat16",
            "placement.experts_in_every_island=false")
    return only_run(folder)
