"""TopP: as many of the best experts as it takes to reach a probability, so that hard tokens get more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from moedist.config import RouterConfig, key
from moedist.errors import ConfigError
from moedist.routing.base import Assignment, Router, RouterInput, entropy_sum, router_logits, rows_of_tokens, z_loss


@dataclass(frozen=True)
class TopPOptions:
    threshold: float = key(0.4, "probability that a token's experts reach together")
    entropy_loss: float = key(1e-4, "weight of the entropy of the probabilities, which keeps them peaked and tokens at few "
                                    "experts")


class TopPRouter(Router):
    """Dynamic routing (Huang et al. 2024, arXiv 2403.07652): the smallest set of best experts whose probabilities sum to
    `threshold` or more; weights are the probabilities, never scaled, or a token of one expert would give its router no
    gradient. Their dynamic loss is the entropy of the probabilities, beside the balance loss.

    `model.top_k` chooses nothing here; planning takes it for the mean number of experts of a token.
    """

    balances = True
    Options = TopPOptions

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, config, sequence)
        self.weight = nn.Parameter(torch.empty(experts, width))

    def check(self) -> None:
        if not 0 < self.options.threshold <= 1:
            raise ConfigError(f"router.options: threshold is {self.options.threshold:g}, a probability; give it above 0 and "
                              "up to 1, such as 0.4")

    def loss_weights(self) -> dict[str, float]:
        return super().loss_weights() | {"entropy_loss": self.options.entropy_loss}

    def most_rows_per_token(self) -> float:
        return min(self.experts, self.options.threshold * self.experts + 1)  # where all experts are alike

    def forward(self, inputs: RouterInput) -> Assignment:
        logits_TE = router_logits(inputs.x_GSD, self.weight)
        probs_TE = logits_TE.softmax(-1)
        sorted_TE, experts_TE = probs_TE.sort(-1, descending=True)
        aux = z_loss(logits_TE, self.config)
        if self.options.entropy_loss:
            aux["entropy_loss"] = torch.special.entr(probs_TE).sum()
        return rows_of_tokens(inputs, experts_TE, sorted_TE, self.experts, self.config.capacity_factor or 0.0,
                              smallest_set(sorted_TE.detach(), self.options.threshold), self.top_k,
                              prob_sum_E=probs_TE.sum(0) if self.config.balance_loss else None, aux_losses=aux,
                              stats={"entropy": entropy_sum(probs_TE)})


def smallest_set(sorted_TE: torch.Tensor, threshold: float) -> torch.Tensor:
    """bool [T, E]: the first of each row of probabilities in falling order, up to where their sum reaches `threshold`.

    >>> smallest_set(torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25]]), 0.5).tolist()
    [[True, False, False], [True, True, False]]
    """
    before_TE = sorted_TE.cumsum(-1) - sorted_TE
    return (before_TE < threshold).index_fill(-1, torch.zeros(1, dtype=torch.int64, device=sorted_TE.device), True)
