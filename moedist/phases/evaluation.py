"""Perplexity of held-out tokens, over any number of ranks."""

from __future__ import annotations

import math
from typing import Callable, Iterable, NamedTuple

import torch

from moedist.data import EvalStream
from moedist.engine import forward_loss
from moedist.model import Batch, Transformer
from moedist.placement import equal_counts
from moedist.world import World

EVAL_SEED = 0  # routers that draw experts at random draw the same in every evaluation


class HeldOut(NamedTuple):
    """Mean loss in nats per token, and the number of tokens it is a mean of."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def held_out_loss(model: Transformer, stream: EvalStream, world: World, dtype: torch.dtype,
                  sequences: int = 16, progress: Callable[[range], Iterable[int]] = iter) -> HeldOut:
    """Loss on every token of `stream`, `sequences` at a time over all ranks.

    Every rank makes the same number of forward passes; sums are divided once, so uneven ranks do not bias the mean.
    """
    was_training = model.training
    model.eval()
    counts = equal_counts(sequences, world.size)
    sums = torch.zeros(2, dtype=torch.float64)
    for first in progress(range(0, stream.sequences, sequences)):
        offset = first + sum(counts[:world.rank])
        inputs, targets = stream.batch(offset, counts[world.rank])
        keys = (offset + torch.arange(len(inputs))).unsqueeze(1) * inputs.shape[1] + torch.arange(inputs.shape[1])
        sums[0] += forward_loss(model, Batch(inputs, keys, EVAL_SEED), targets, world.device, dtype)[0].item()
        sums[1] += (targets >= 0).sum()  # padding is negative
    world.all_reduce_(sums)
    model.train(was_training)
    return HeldOut(sums[0].item() / max(sums[1].item(), 1), int(sums[1]))
