"""ReXMoE: a layer's router chooses among the experts of several adjacent layers, few of the others' at first."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moedist.config import RouterConfig, key
from moedist.errors import ConfigError
from moedist.routing.base import RouterInput
from moedist.routing.noise import uniform
from moedist.routing.topk import TopKRouter

ORDER_SEED = 0x2E  # fixed: the order is part of the model, not of a run


@dataclass(frozen=True)
class ReXMoEOptions:
    steps: int = key(1000, "steps in which the experts of the other layers come in, evenly (0: all are there from the start)")


class ReXMoERouter(TopKRouter):
    """ReXMoE (Tan et al. 2025, arXiv 2510.17483): experts reused across layers, with progressive scaling routing.

    `model.pool_layers` = R adjacent layers share one pool of `model.experts` experts, which is E = R times as many as each
    would have had; each layer has a router over all E, its only overhead. At first a router sees the E / R experts that would
    be its layer's own, and over `steps` steps the others come in, until none is masked. Their order is drawn once for each
    place in the pool (the paper masks so many; it was read in its abstract and summaries, and which ones is ours to choose).
    A masked expert has no probability. The pool is one set of experts to placement, compression and checkpoints, under the
    name of its first layer; its load is the sum over the layers.

    Steps done are state of the model, saved with it: an evaluation routes as training does at that step.
    """

    Options = ReXMoEOptions

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, config, sequence)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.take_place(0, 1)

    def check(self) -> None:
        if self.options.steps < 0:
            raise ConfigError(f"router.options: steps is {self.options.steps}; give 0 or more")

    def take_place(self, place: int, layers: int) -> None:
        self.own = max(self.experts // layers, min(self.top_k, self.experts))  # a token needs K to choose from
        keys = torch.arange(self.experts)
        first = place * (self.experts // layers)
        rank = uniform(keys, 1, ORDER_SEED + place).squeeze(1) + ((keys - first) % self.experts >= self.experts // layers)
        self.register_buffer("order", rank.argsort(stable=True).argsort(), persistent=False)  # [E] when each comes in

    def scores(self, inputs: RouterInput) -> torch.Tensor:
        logits_TE = super().scores(inputs)
        # compared on the device: no host has to wait for the number of steps
        ready = candidates_at(self.steps, self.own, self.experts, self.options.steps)
        return logits_TE.masked_fill(self.order >= ready, MASKED)

    @torch.no_grad()
    def after_step(self, demand_E: torch.Tensor) -> None:
        """Count a step, beside what `TopKRouter` does."""
        super().after_step(demand_E)
        self.steps += 1


MASKED = -1e4  # as a logit: no probability in any dtype, and, unlike minus infinity, no loss that is not finite


def candidates_at(done: torch.Tensor, own: int, experts: int, steps: int) -> torch.Tensor:
    """Experts that a router may choose among after so many steps: from `own` evenly up to all.

    >>> [int(candidates_at(torch.tensor(done), 2, 8, 3)) for done in range(5)]
    [2, 4, 6, 8, 8]
    """
    if not steps:
        return torch.full_like(done, experts)
    return own + (experts - own) * done.clamp(max=steps) // steps
