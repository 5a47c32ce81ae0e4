"""Small trainings with any engine, on any number of ranks, for comparison with one process and the torch engine."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moedist.config import EngineConfig, config_from_dict
from moedist.dispatch import build_transport
from moedist.engine import Engine, TorchEngine
from moedist.engine.deepspeed_engine import DeepSpeedEngine
from moedist.model import Batch, Transformer
from moedist.placement import plan_from_config
from moedist.world import World
from tests.ranks import RankPool, ranks

COUNTS = {1: [4], 2: [3, 1], 3: [1, 0, 3]}
SEQUENCES = {1: (8,), 2: (6, 2), 3: (5, 0, 3)}  # of a batch of 8: a rank without experts is one without sequences too
SPLIT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # or what is small stays whole on every rank
VOCAB = 21


@dataclass(frozen=True)
class Training:
    """Which engine, and how the configuration differs from a tiny mixture of experts with SGD."""

    stage: int | None = None  # None: the torch engine
    train: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    router: dict[str, Any] = field(default_factory=dict)
    offload: str = "none"
    accumulate: int = 2


def pool(world_size: int) -> RankPool:
    """Processes apart from this one even for a world of one, since DeepSpeed needs a process group there too."""
    return ranks(world_size)


def build(world: World, case: Training, folder: Path) -> Engine:
    config = config_from_dict({
        "model": {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "experts": 4, "expert_hidden": 8, **case.model},
        "data": {"sequence_length": 6}, "placement": {"counts": COUNTS[world.size]}, "router": case.router,
        "train": {"optimizer": "sgd", "batch": 8, "lr": 0.3, "clip": 1.0, "accumulate": case.accumulate, **case.train}})
    plan = plan_from_config(config, world.size)
    model = Transformer(config, VOCAB, plan, build_transport(world), world.device, torch.float32)
    if case.stage is None:
        return TorchEngine(model, config.train, world)
    path = folder / f"deepspeed-{world.size}-{world.rank}.json"
    path.write_text(json.dumps(SPLIT_ALL), encoding="utf-8")
    return DeepSpeedEngine(model, config.train, world, EngineConfig("deepspeed", case.stage, case.offload, str(path)))


def backward(world: World, engine: Engine, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """All passes of a step over this rank's sequences; the mean loss's local part."""
    total, parts = torch.zeros((), dtype=torch.float64), engine.config.accumulate
    ids = (torch.arange(8).unsqueeze(1) * 5 + step + 2 * torch.arange(7)) % VOCAB  # the next token is the one after the next
    first = sum(SEQUENCES[world.size][:world.rank])
    mine = range(first, first + SEQUENCES[world.size][world.rank])
    keys = torch.arange(8 * 6).view(8, 6)
    for part in range(parts):
        rows = [i for i in mine if i % parts == part]
        loss, reports = engine.forward(Batch(ids[rows, :-1], keys[rows], step), ids[rows, 1:], dtype)
        aux = sum(0.01 * value for report in reports.values() for value in report.aux_losses.values())
        engine.backward((loss + aux) / (8 * 6))
        total += loss.detach().double() / (8 * 6)
    return total


def train(world: World, engine: Engine, steps: int, first: int = 0, dtype: torch.dtype = torch.float32) -> list[float]:
    """Losses of `steps` steps."""
    found = []
    for step in range(first, first + steps):
        loss = backward(world, engine, step, dtype)
        found.append(engine.step(engine.config.lr, loss.reshape(1)).sums.item())
    return found


def full_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of what this rank offers to a checkpoint."""
    return {name: t.clone() for name, t in engine.named_tensors().items()}


def union(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: t for part in parts for name, t in part.items()}
