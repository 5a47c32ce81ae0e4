"""NullExperts: tokens may choose experts that do nothing, so that easy ones get fewer real experts."""

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
class NullOptions:
    null_experts: int = key(0, "experts that do nothing, beside those of the model (0: as many)")


class NullExpertsRouter(Router):
    """AdaMoE (Zeng et al. 2024, arXiv 2406.13233): E true and M null experts, of which a token takes the K * (E + M) / E best
    (rounded up), so that K are true on average once all are loaded alike. Rows for null experts are not sent; weights are
    scaled to one over the true experts of a token, and a token with none passes by the residual alone.

    The balance loss is theirs: null experts, being all the same, count by their mean load, so that a token is free to take
    many or none. Loads are those of a sequence, not of the batch: ranks tell each other only how often true experts are
    chosen.
    """

    Options = NullOptions

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, config, sequence)
        self.null = self.options.null_experts or experts
        self.choices = -(-top_k * (experts + self.null) // experts)
        self.weight = nn.Parameter(torch.empty(experts + self.null, width))

    def check(self) -> None:
        if self.options.null_experts < 0:
            raise ConfigError(f"router.options: null_experts is {self.options.null_experts}; give 1 or more, or 0 for as many "
                              f"as there are experts ({self.experts})")

    def most_rows_per_token(self) -> float:
        return float(min(self.choices, self.experts))

    def forward(self, inputs: RouterInput) -> Assignment:
        g, s, _ = inputs.x_GSD.shape
        logits_TA = router_logits(inputs.x_GSD, self.weight)  # A = E + M, true experts first
        probs_TA = logits_TA.softmax(-1)
        chosen_TK = probs_TA.topk(self.choices, dim=-1).indices
        true_TK = chosen_TK < self.experts
        weights_TK = probs_TA.gather(1, chosen_TK)
        if self.config.normalize:
            weights_TK = scaled_to_one(weights_TK, true_TK)
        aux = z_loss(logits_TA, self.config)
        if self.config.balance_loss:
            load_TA = torch.zeros_like(probs_TA).scatter(1, chosen_TK, 1.0)
            load_TA[:, self.experts:] = load_TA[:, self.experts:].mean(1, keepdim=True)
            aux["balance_loss"] = sequence_balance_loss_sum(probs_TA.unflatten(0, (g, s)), load_TA.unflatten(0, (g, s)))
        return rows_of_tokens(inputs, chosen_TK.clamp(max=self.experts - 1), weights_TK, self.experts,
                              self.config.capacity_factor or 0.0, true_TK, self.top_k, aux_losses=aux,
                              stats={"entropy": entropy_sum(probs_TA)})
