"""Write compressed experts as dense matrices of the shape they had before any compression: what was dropped is zero.

The function is the same, and any program that knows only experts of one width can read them. Optimizer state goes with them.
"""

from __future__ import annotations

import dataclasses
from typing import Sequence

import torch

from moedist.checkpoint import RunFolder, forms_of, load_checkpoint, read_meta
from moedist.compress import Compressed
from moedist.compress.matrices import Dense
from moedist.config import check_config, for_ranks
from moedist.coordinator import equal_plan
from moedist.engine import TorchEngine
from moedist.engine.dense_moments import dense_moments
from moedist.model import Bank, Transformer
from moedist.model.forms import PARTS, by_part
from moedist.phases.run import Progress, weight_dtype
from moedist.trainer import build_run, refuse_low_bits
from moedist.world import World, find_launch


def dense_run(run_folder: str, overrides: Sequence[str] = (), step: int | None = None, name: str | None = None) -> RunFolder:
    """Write a new run folder that holds the checkpoint with dense experts of `model.expert_hidden` neurons.

    Args:
        step: the checkpoint to take (None: the newest).
        name: of the new run (None: that of the old with -dense).
    """
    old, size = RunFolder(run_folder), find_launch().size
    checkpoint = old.of_step(step)
    meta = read_meta(checkpoint)
    config, _ = for_ranks(old.config(list(overrides)), size)
    config = dataclasses.replace(config, name=name or f"{config.name}-dense")
    check_config(config, size)
    refuse_low_bits(checkpoint, forms_of(checkpoint), meta)
    with World.start(config.world) as world:
        run = build_run(config, world, equal_plan(config, world.size), None)
        transport = next(iter(run.model.moe_layers()))[1].dispatcher.transport
        model = Transformer(config, run.model.embedding.num_embeddings, run.plan, transport, world.device, weight_dtype(config),
                            forms=forms_of(checkpoint))
        engine = TorchEngine(model, config.train, world)
        stored, target = engine.named_tensors(), run.engine.named_tensors()
        load_checkpoint(checkpoint, stored, world)
        for key, tensor in target.items():
            if ".experts." not in key:
                tensor.copy_(stored[key])
        for layer, bank in model.banks.items():
            _fill(bank, engine.experts.tensors(layer), run.model.banks[layer], run.engine.experts.tensors(layer))
        run.engine.loaded(meta["counters"])
        run.progress = Progress(**meta["progress"])
        run.save()
        run.recorder.close()
        return run.folder


@torch.no_grad()
def _fill(source: Bank, values: list[tuple[torch.Tensor, ...]], target: Bank, into: list[tuple[torch.Tensor, ...]]) -> None:
    """Weights, then each Adam moment, of all experts of a bank, padded."""
    for e in source.expert_ids:
        stored, hidden = source.stored(e, target.form_of(e).hidden), target.form_of(e).hidden
        for i, (tensors, views) in enumerate(zip(values, into)):
            if i == 0:
                parts = stored.padded().parts
            else:
                moments = dense_moments(stored, by_part(source.split(e, tensors)), second=i == 2)
                parts = Compressed(hidden, stored.neurons, {part: Dense(m) for part, m in moments.items()}).padded().parts
            for name, view in target.split(e, views).items():
                view.copy_({PARTS[target.form_of(e).gated][part]: matrix for part, matrix in parts.items()}[name])
