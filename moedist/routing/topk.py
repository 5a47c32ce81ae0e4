"""TopK: softmax over experts, the K best, weights scaled to sum to one; optionally balanced without a loss."""

from __future__ import annotations

import torch
from torch import nn

from moedist.config import RouterConfig
from moedist.routing.base import (
    Assignment, Router, RouterInput, entropy_sum, router_logits, rows_of_tokens, scaled_to_one, z_loss,
)


class TopKRouter(Router):
    """Top-k softmax routing as in Mixtral (Jiang et al. 2024, arXiv 2401.04088, section 2.1).

    With `bias_rate` > 0 a bias per expert is added to the score that chooses (not to the weight) and moves after every
    step by `bias_rate` towards equal loads, or targets (see `Router`): auxiliary-loss-free balancing (Wang et al. 2024, arXiv
    2408.15664, algorithm 1; their ablations have a rule without the sign). The bias is state of the model, the same on every
    rank.
    """

    balances = True

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, config, sequence)
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("bias", torch.zeros(experts))

    def forward(self, inputs: RouterInput) -> Assignment:
        logits_TE = self.scores(inputs)
        probs_TE = logits_TE.softmax(-1)
        biased_TE = probs_TE.detach() + self.bias.to(probs_TE.dtype) if self.config.bias_rate else probs_TE
        experts_TK = self.choose(biased_TE)
        weights_TK = probs_TE.gather(1, experts_TK)
        if self.config.normalize:
            weights_TK = scaled_to_one(weights_TK)
        return rows_of_tokens(inputs, experts_TK, weights_TK, self.experts, self.config.capacity_factor or 0.0,
                              prob_sum_E=probs_TE.sum(0) if self.config.balance_loss else None,
                              aux_losses=z_loss(logits_TE, self.config),
                              stats={"entropy": entropy_sum(probs_TE)})

    def scores(self, inputs: RouterInput) -> torch.Tensor:
        """[T, E] logits that choose the experts."""
        return router_logits(inputs.x_GSD, self.weight)

    def choose(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """[T, K] experts of every token, best first."""
        return scores_TE.topk(self.top_k, dim=-1).indices

    @torch.no_grad()
    def after_step(self, demand_E: torch.Tensor) -> None:
        """Move the bias one step towards equal loads, or those that the plan aims at."""
        if self.config.bias_rate:
            self.bias += self.bias_step(demand_E, self.config.bias_rate).to(self.bias)
