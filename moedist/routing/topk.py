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

    With `bias_rate` > 0 there is a bias per expert, which moves after every step by `bias_rate` towards equal loads, or
    targets (see `Router`). It is state of the model, the same on every rank, and no gradient reaches it.

    - `bias_in=choice`: it is added to the score that chooses, not to the weight: auxiliary-loss-free balancing (Wang et al.
      2024, arXiv 2408.15664, algorithm 1; their ablations have a rule without the sign).
    - `bias_in=logits`: it is added to the logits, so that weights too are those of softmax(x W + b). Probabilities with such a
      b, with which experts get what they are to get, are the plan of entropic optimal transport between tokens and experts,
      where b is the dual variable of the experts (Cuturi 2013, arXiv 1306.0895; over a stream of tokens, by steps like these,
      Genevay et al. 2016, arXiv 1605.08527); here what they get is counted in rows of the K best, not in probabilities.
    """

    balances = True

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, config, sequence)
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("bias", torch.zeros(experts))

    def forward(self, inputs: RouterInput) -> Assignment:
        logits_TE = self.scores(inputs)
        bias_E, in_logits = self.bias.to(logits_TE.dtype), self.config.bias_in == "logits"
        probs_TE = (logits_TE + bias_E if self.config.bias_rate and in_logits else logits_TE).softmax(-1)
        experts_TK = self.choose(probs_TE.detach() + bias_E if self.config.bias_rate and not in_logits else probs_TE)
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
