"""LossFree: sigmoid scores, and a bias that evens out loads instead of a loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from moedist.config import RouterConfig, key
from moedist.errors import ConfigError
from moedist.routing.base import (
    Assignment, Router, RouterInput, entropy_sum, router_logits, rows_of_tokens, scaled_to_one, z_loss,
)
from moedist.routing.losses import sequence_balance_loss_sum


@dataclass(frozen=True)
class LossFreeOptions:
    update_rate: float = key(0.001, "how far a bias moves after every step")
    sequence_loss: float = key(0.0, "weight of the balance loss within each sequence (DeepSeek-V3: 0.0001)")


class LossFreeRouter(Router):
    """Auxiliary-loss-free balancing as DeepSeek-V3 has it (arXiv 2412.19437, section 2.1.2): scores s = sigmoid(x W) (eq. 15),
    the K best of s + b (eq. 16), weights s over their sum (eq. 13). After every step b falls by `update_rate` where an expert
    had more than the mean load and rises where it had less (Wang et al. 2024, arXiv 2408.15664, algorithm 1).

    There is no balance loss; `sequence_loss` is the weight of the complementary one against imbalance within a single sequence
    (eq. 17-20), in which the bias does not count.
    """

    balances = True
    Options = LossFreeOptions

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, config, sequence)
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("bias", torch.zeros(experts))

    def check(self) -> None:
        o = self.options
        if o.update_rate < 0 or o.sequence_loss < 0:
            raise ConfigError(f"router.options: update_rate is {o.update_rate:g} and sequence_loss {o.sequence_loss:g}; both "
                              "must be 0 or more")

    def loss_weights(self) -> dict[str, float]:
        return super().loss_weights() | {"sequence_loss": self.options.sequence_loss}

    def forward(self, inputs: RouterInput) -> Assignment:
        logits_TE = router_logits(inputs.x_GSD, self.weight)
        scores_TE = logits_TE.sigmoid()
        experts_TK = self.choose(scores_TE.detach() + self.bias.to(scores_TE.dtype))
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.config.normalize:
            weights_TK = scaled_to_one(weights_TK)
        probs_TE = scaled_to_one(scores_TE)
        aux = z_loss(logits_TE, self.config)
        if self.options.sequence_loss:
            g, s, _ = inputs.x_GSD.shape
            best_TE = torch.zeros_like(scores_TE).scatter(1, scores_TE.topk(self.top_k, dim=-1).indices, 1.0)
            aux["sequence_loss"] = sequence_balance_loss_sum(probs_TE.unflatten(0, (g, s)), best_TE.unflatten(0, (g, s)))
        return rows_of_tokens(inputs, experts_TK, weights_TK, self.experts, self.config.capacity_factor or 0.0,
                              aux_losses=aux, stats={"entropy": entropy_sum(probs_TE)})

    def choose(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """[T, K] experts of every token, by scores with bias."""
        return scores_TE.topk(self.top_k, dim=-1).indices

    @torch.no_grad()
    def after_step(self, demand_E: torch.Tensor) -> None:
        """Move the bias one step towards equal loads, or those that the plan aims at."""
        self.bias += self.bias_step(demand_E, self.options.update_rate).to(self.bias)
