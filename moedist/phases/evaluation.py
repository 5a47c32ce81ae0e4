"""Perplexity of held-out tokens, over any number of ranks."""

from __future__ import annotations

import math
from typing import Callable, Iterable, NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from moedist.data import EvalStream
from moedist.engine import forward_loss
from moedist.model import Batch, Transformer
from moedist.monitor import RoutingMemory
from moedist.placement import equal_counts
from moedist.routing import Assignment, Router
from moedist.world import World

EVAL_SEED = 0  # routers that draw experts at random draw the same in every evaluation


class HeldOut(NamedTuple):
    """Mean loss in nats per token, the number of tokens it is a mean of, and the share of the routing of the evaluation
    before that is unchanged, where that is known."""

    loss: float
    tokens: int
    stability: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def held_out_loss(model: Transformer, stream: EvalStream, world: World, dtype: torch.dtype,
                  sequences: int = 16, progress: Callable[[range], Iterable[int]] = iter,
                  routing: RoutingMemory | None = None, seed: int = EVAL_SEED) -> HeldOut:
    """Loss on every token of `stream`, `sequences` at a time over all ranks.

    Every rank makes the same number of forward passes; sums are divided once, so uneven ranks do not bias the mean.

    Args:
        routing: remembers where the tokens of the first pass go, for the next evaluation.
        seed: of routers that draw experts at random.
    """
    was_training = model.training
    model.eval()
    counts = equal_counts(sequences, world.size)
    sums = torch.zeros(4, dtype=torch.float64)
    hooks = _remember(model, routing)
    for first in progress(range(0, stream.sequences, sequences)):
        offset = first + sum(counts[:world.rank])
        inputs, targets = stream.batch(offset, counts[world.rank])
        keys = (offset + torch.arange(len(inputs))).unsqueeze(1) * inputs.shape[1] + torch.arange(inputs.shape[1])
        sums[0] += forward_loss(model, Batch(inputs, keys, seed), targets, world.device, dtype)[0].item()
        sums[1] += (targets >= 0).sum()  # padding is negative
        while hooks:
            hooks.pop().remove()
    if routing is not None:
        sums[2], sums[3] = routing.compare()
    world.all_reduce_(sums)
    model.train(was_training)
    kept, pairs = sums[2:].tolist()
    return HeldOut(sums[0].item() / max(sums[1].item(), 1), int(sums[1]), kept / pairs if pairs else None)


def _remember(model: Transformer, routing: RoutingMemory | None) -> list[RemovableHandle]:
    """Let every router show its routing to `routing` until the handles are removed."""
    if routing is None:
        return []
    def note(layer: int, router: Router, routed: Assignment) -> None:
        routing.note(layer, routed, router.experts, router.top_k)

    return [moe.router.register_forward_hook(lambda router, _, routed, layer=i: note(layer, router, routed))
            for i, _, moe in model.routed_layers()]
