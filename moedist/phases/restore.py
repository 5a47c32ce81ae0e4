"""Open a finished or running run for evaluation and generation, on any number of ranks."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from moedist.checkpoint import RunFolder, forms_of, load_checkpoint, read_meta
from moedist.config import Config
from moedist.coordinator import equal_plan
from moedist.data import Tokenizer
from moedist.dispatch import build_transport
from moedist.model import Transformer
from moedist.offload import Offloaded, offload
from moedist.phases.run import DTYPES, weight_dtype
from moedist.world import World


def take_outside(opened: "OpenedRun") -> Optional[Offloaded]:
    """Move the experts of an opened run outside the device where its configuration says so; None where it does not."""
    c = opened.config
    return None if c.offload.store == "none" else offload(opened.model, c.offload, DTYPES[c.train.dtype])


def offload_metrics(outside: Offloaded, world: World) -> dict[str, float]:
    """What all ranks' caches have done, reduced as `moedist.monitor.METRICS` says. Collective."""
    m = outside.moved
    sums = world.all_reduce_(torch.tensor([m.bytes, m.ahead_bytes, m.hits, m.hits + m.misses], dtype=torch.float64))
    most = world.all_reduce_(torch.tensor([m.stall_s, m.peak], dtype=torch.float64), "max")
    return {"offload/bytes": float(sums[0]), "offload/ahead_bytes": float(sums[1]),
            "offload/hit_rate": float(sums[2] / sums[3].clamp(min=1)), "offload/stall_s": float(most[0]),
            "offload/peak_bytes": float(most[1])}


class OpenedRun(NamedTuple):
    """A model with the weights of a checkpoint."""

    config: Config
    tokenizer: Tokenizer
    model: Transformer
    step: int


def open_run(folder: RunFolder, config: Config, world: World, step: int | None = None) -> OpenedRun:
    """Load a checkpoint (the newest, or that of `step`) with experts spread equally over this world.

    Raises:
        CheckpointError: no run folder, no checkpoint, or no checkpoint of that step.
    """
    checkpoint = folder.of_step(step)
    meta = read_meta(checkpoint)
    tokenizer = Tokenizer.load(folder.path)
    model = Transformer(config, tokenizer.vocab_size, equal_plan(config, world.size), build_transport(world), world.device,
                        weight_dtype(config), forms=forms_of(checkpoint))
    load_checkpoint(checkpoint, model.named_state(), world)
    return OpenedRun(config, tokenizer, model.eval(), meta["progress"]["step"])
