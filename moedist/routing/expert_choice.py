"""ExpertChoice: every expert takes the tokens that score it highest, so loads are equal by construction."""

from __future__ import annotations

import torch
from torch import nn

from moedist.config import RouterConfig
from moedist.routing.base import (
    Assignment, Router, RouterInput, demand, entropy_sum, even_share, router_logits, z_loss,
)


class ExpertChoiceRouter(Router):
    """Expert-choice routing (Zhou et al. 2022, arXiv 2202.09368, section 3.2), within each sequence.

    An expert takes its `capacity_factor` * S * K / E best tokens of a sequence; a token may get any number of experts.
    Not causal: whether a token is taken depends on later tokens, so perplexity is optimistic.
    """

    causal = False

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, config, sequence)
        self.weight = nn.Parameter(torch.empty(experts, width))

    def most_rows_per_token(self) -> float:
        return self.expected_rows_per_token()

    def expected_rows_per_token(self) -> float:
        return self._taken(self.sequence) * self.experts / self.sequence

    def _taken(self, s: int) -> int:
        """Tokens that an expert takes of a sequence of s."""
        return min(s, even_share(s, self.top_k, self.experts, self.config.capacity_factor or 1.0))

    def forward(self, inputs: RouterInput) -> Assignment:
        g, s, _ = inputs.x_GSD.shape
        logits_TE = router_logits(inputs.x_GSD, self.weight)
        probs_TE = logits_TE.softmax(-1)
        weights_GCE, places_GCE = probs_TE.view(g, s, self.experts).topk(self._taken(s), dim=1)
        starts_G11 = torch.arange(g, device=logits_TE.device).view(g, 1, 1) * s
        token_ids, by_token = (places_GCE + starts_G11).reshape(-1).sort(stable=True)
        experts = torch.arange(self.experts, device=logits_TE.device).expand_as(places_GCE).reshape(-1)[by_token]
        return Assignment(token_ids, experts, weights_GCE.reshape(-1)[by_token], demand_E=demand(experts, self.experts),
                          aux_losses=z_loss(logits_TE, self.config), stats={"entropy": entropy_sum(probs_TE)})
