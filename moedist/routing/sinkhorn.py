"""Sinkhorn: in some training steps loads are evened out by optimal transport, so that no balance loss is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from moedist.config import RouterConfig, key
from moedist.errors import ConfigError
from moedist.routing.base import (
    Assignment, Router, RouterInput, entropy_sum, router_logits, rows_of_tokens, scaled_to_one, z_loss,
)
from moedist.routing.noise import mix_seeds

SALT = 0x51C


@dataclass(frozen=True)
class SinkhornOptions:
    fraction: float = key(0.01, "part of the training steps whose routes are balanced (1: all, as Clark et al. do)")
    iterations: int = key(8, "rounds of scaling, over tokens and over experts")
    temperature: float = key(1.0, "logits are divided by it before; a small one makes routes hard")


class SinkhornRouter(Router):
    """Selective Sinkhorn routing (Nguyen et al. 2025, arXiv 2511.08972): tokens go to experts by an optimal transport plan in
    a part of the training steps, drawn at random, and by top-k softmax in all others and in evaluation. Experts and weights of
    a balanced step are those of the plan, so that its gradient reaches the router; there is no balance loss. `temperature` is
    their weight of the plan's entropy; their optional noise is left out. With `fraction=1` experts are chosen as by the
    Sinkhorn routing of Clark et al. 2022 (arXiv 2202.01169), which in the limit of a small temperature is the assignment of
    BASE layers (Lewis et al. 2021, arXiv 2103.16716).

    The plan is made within each sequence, not the batch, so that any number of ranks has the same. In a balanced training
    step a route depends on later tokens; in evaluation and generation it never does, so perplexity is not optimistic: `causal`
    is True.
    """

    Options = SinkhornOptions

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, config, sequence)
        self.weight = nn.Parameter(torch.empty(experts, width))

    def check(self) -> None:
        o = self.options
        if not 0 <= o.fraction <= 1 or o.iterations < 1 or o.temperature <= 0:
            raise ConfigError(f"router.options: fraction is {o.fraction:g} (0 to 1), iterations {o.iterations} (1 or more), "
                              f"temperature {o.temperature:g} (above 0); one of them is out of its range")

    def forward(self, inputs: RouterInput) -> Assignment:
        logits_TE = router_logits(inputs.x_GSD, self.weight)
        probs_TE = logits_TE.softmax(-1)
        if inputs.training and chance(inputs.seed) < self.options.fraction:
            g, s, _ = inputs.x_GSD.shape
            logits_GSE = logits_TE.view(g, s, self.experts) / self.options.temperature
            probs_TE = transport_plan(logits_GSE, self.options.iterations).flatten(0, 1)
        weights_TK, experts_TK = probs_TE.topk(self.top_k, dim=-1)
        if self.config.normalize:
            weights_TK = scaled_to_one(weights_TK)
        return rows_of_tokens(inputs, experts_TK, weights_TK, self.experts, self.config.capacity_factor or 0.0,
                              aux_losses=z_loss(logits_TE, self.config), stats={"entropy": entropy_sum(probs_TE)})


def chance(seed: int) -> float:
    """A number in [0, 1) for the step and layer of `seed`, the same on every rank."""
    return (mix_seeds(seed, SALT) >> 10) / (1 << 53)


def transport_plan(logits_GSE: torch.Tensor, iterations: int) -> torch.Tensor:
    """exp(logits) with rows and columns scaled in turn, so that each token's sum to 1 and, nearly, each expert's to S / E.

    Sinkhorn and Knopp 1967, with logarithms: the plan that is closest to the logits with entropy (Cuturi 2013, arXiv
    1306.0895). Also of matrices, as [N, E, E] to doubly stochastic ones.
    """
    s, e = logits_GSE.shape[1:]
    share = math.log(s / e) if s else 0.0
    for _ in range(iterations):
        logits_GSE = logits_GSE - logits_GSE.logsumexp(1, keepdim=True) + share
        logits_GSE = logits_GSE - logits_GSE.logsumexp(2, keepdim=True)
    return logits_GSE.exp()
