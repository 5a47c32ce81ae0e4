"""StochasticTopK: the scores get learned Gaussian noise before the K best are taken."""

from __future__ import annotations

import torch
from torch import nn

from moedist.config import RouterConfig
from moedist.routing.base import RouterInput, router_logits
from moedist.routing.noise import normal
from moedist.routing.topk import TopKRouter


class StochasticTopKRouter(TopKRouter):
    """Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538, eq. 4): H = x W + normal * softplus(x W_noise).

    The noise is off in evaluation. It is drawn from the token's place in the global batch, so any number of ranks draws
    the same.
    """

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, config, sequence)
        self.noise_weight = nn.Parameter(torch.empty(experts, width))

    def scores(self, inputs: RouterInput) -> torch.Tensor:
        clean_TE = router_logits(inputs.x_GSD, self.weight)
        if not inputs.training:
            return clean_TE
        scale_TE = nn.functional.softplus(router_logits(inputs.x_GSD, self.noise_weight))
        return clean_TE + scale_TE * normal(inputs.keys_GS.flatten(), self.experts, inputs.seed, clean_TE.dtype)
