"""A training of a second, of any router, whose losses are recorded: real steps in one process, in float64, on text that a
rule makes.

The text is a chain of letters: each follows from the one before by a fixed table, three times of four, else it is any. An
expert, which sees one token at a time, learns the table sooner than attention can.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from moedist.config import Config, check_config, config_from_dict
from moedist.phases.train import train_step
from moedist.routing import check_router
from moedist.routing.noise import hash_int
from moedist.trainer import build_run, written_plan
from moedist.world import World
from tests.routing.settings import options_of

RECORDED = Path(__file__).parent / "recorded"
LETTERS, LENGTH, STEPS = 40, 10_000, 24
SEED = 11


def text() -> str:
    """LENGTH letters, the same on every machine.

    No letter follows itself: two tokens that see the same would tie where a router compares tokens, and rounding decide.
    """
    circle = torch.randperm(LETTERS, generator=torch.Generator().manual_seed(SEED)).tolist()
    draws = hash_int(torch.arange(LENGTH), SEED).tolist()
    found, place = [], 0
    for draw in draws:
        place = (place + (1 if draw % 4 else 1 + draw // 4 % (LETTERS - 1))) % LETTERS
        found.append(chr(ord("A") + circle[place]))
    return "".join(found)


def config_of(name: str, folder: Path, **train: Any) -> Config:
    """The tiny run of a router, with its data and results in `folder`."""
    (folder / "text").mkdir(parents=True, exist_ok=True)
    (folder / "text" / "train.txt").write_text(text())
    (folder / "text" / "valid.txt").write_text(text()[:2000])
    given = options_of(name)
    model = {"layers": 2, "width": 24, "heads": 2, "kv_heads": 1, "experts": 8, "top_k": 2, "expert_hidden": 16,
             "init_std": 0.2}
    config = config_from_dict({
        "name": name, "folder": str(folder / "runs"),
        "data": {"source": "files", "path": str(folder / "text"), "tokenizer": "byte", "sequence_length": 32,
                 "cache": str(folder / "cache")},
        "model": {**model, **given.get("model", {})},
        "router": {"name": name, **given.get("router", {})},
        "placement": {"counts": [8], "batch_shares": [1]},
        # a small epsilon would let Adam turn rounding noise into whole steps
        "train": {"batch": 8, "dtype": "float64", "lr": 1e-2, "eps": 1e-5, "warmup_steps": 4, "schedule": "constant",
                  "weight_decay": 0.0, **train},
        "world": {"device": "cpu"}, "checkpoint": {"every": 0}, "monitor": {"wandb": "disabled", "output": "quiet"},
        "phases": [{"train": STEPS}]})
    check_config(config, 1)
    check_router(config)
    return config


def losses(name: str, folder: Path, frozen: bool = False, steps: int = STEPS) -> list[float]:
    """Loss per token of every step.

    Args:
        frozen: routers and experts stay as they were initialised; all else learns.
    """
    config = config_of(name, folder, **({"expert_lr_ratio": 1e-30} if frozen else {}))
    run = build_run(config, World(), written_plan(config, 1, None)[0])
    run.model.train()
    if frozen:
        for _, layer in run.model.moe_layers():
            layer.router.requires_grad_(False)
    tokens = config.train.batch * config.data.sequence_length
    try:
        return [train_step(run).sums["loss"] / tokens for _ in range(steps)]
    finally:
        run.recorder.close()


def record(name: str, folder: Path) -> dict[str, Any]:
    """Train, and write what was seen: the losses, where a frozen model ends, and a bound half way between."""
    curve, frozen = losses(name, folder / name), losses(name, folder / f"{name}-frozen", frozen=True)
    found = {"losses": curve, "frozen": last(frozen), "bound": round((last(curve) + last(frozen)) / 2, 3)}
    (RECORDED / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def recorded(name: str) -> dict[str, Any]:
    return json.loads((RECORDED / f"{name}.json").read_text())


def last(curve: list[float]) -> float:
    """What a training has come to: the mean of its last three losses, since batches differ."""
    return sum(curve[-3:]) / 3
