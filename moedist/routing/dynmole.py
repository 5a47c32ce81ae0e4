"""DynMoLE: tokens whose router is unsure go to all experts, others to as many as reach a probability."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from moedist.config import RouterConfig, key
from moedist.errors import ConfigError
from moedist.routing.base import (
    Assignment, Router, RouterInput, entropy_sum, router_logits, rows_of_tokens, scaled_to_one, z_loss,
)
from moedist.routing.top_p import smallest_set


@dataclass(frozen=True)
class DynMoLEOptions:
    index: float = key(1.1, "q of the Tsallis entropy (1: Shannon's)")
    threshold: float = key(0.9, "Tsallis entropy from which on a token goes to all experts")
    top_p: float = key(0.75, "below it: probability that a token's experts reach together")
    entropy_loss: float = key(0.01, "weight of the Tsallis entropy, which makes routers surer")


class DynMoLERouter(Router):
    """Hybrid routing by Tsallis entropy (DynMoLE, Li et al. 2025, arXiv 2504.00661).

    S_q(p) = (1 - sum p^q) / (q - 1) of a token's probabilities; from `threshold` on it goes to all experts (soft routing),
    below it to the best that reach `top_p`, and to K at least. The mean of S_q is a loss, beside the balance loss.

    Made for LoRA experts, where all experts cost little; here a token of all experts is E rows. An early router is unsure of
    nearly every token, and planning reckons with that.
    """

    balances = True
    Options = DynMoLEOptions

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, config, sequence)
        self.weight = nn.Parameter(torch.empty(experts, width))

    def check(self) -> None:
        o = self.options
        if o.index <= 0 or not 0 < o.top_p <= 1 or o.entropy_loss < 0:
            raise ConfigError(f"router.options: index is {o.index:g} (above 0), top_p {o.top_p:g} (above 0, up to 1), "
                              f"entropy_loss {o.entropy_loss:g} (0 or more); one of them is out of its range")

    def loss_weights(self) -> dict[str, float]:
        return super().loss_weights() | {"entropy_loss": self.options.entropy_loss}

    def most_rows_per_token(self) -> float:
        return float(self.experts)

    def expected_rows_per_token(self) -> float:
        return float(self.experts)

    def forward(self, inputs: RouterInput) -> Assignment:
        logits_TE = router_logits(inputs.x_GSD, self.weight)
        probs_TE = logits_TE.softmax(-1)
        entropy_T = tsallis_entropy(probs_TE, self.options.index)
        sorted_TE, experts_TE = probs_TE.sort(-1, descending=True)
        wanted_TE = smallest_set(sorted_TE.detach(), self.options.top_p)
        wanted_TE[:, :self.top_k] = True
        wanted_TE |= (entropy_T >= self.options.threshold).unsqueeze(1)
        aux = z_loss(logits_TE, self.config)
        if self.options.entropy_loss:
            aux["entropy_loss"] = entropy_T.sum()
        return rows_of_tokens(inputs, experts_TE, scaled_to_one(sorted_TE, wanted_TE) if self.config.normalize else sorted_TE,
                              self.experts, self.config.capacity_factor or 0.0, wanted_TE, self.top_k,
                              prob_sum_E=probs_TE.sum(0) if self.config.balance_loss else None, aux_losses=aux,
                              stats={"entropy": entropy_sum(probs_TE)})


def tsallis_entropy(probs_TE: torch.Tensor, q: float) -> torch.Tensor:
    """[T] (1 - sum p^q) / (q - 1) (Tsallis 1988, doi 10.1007/BF01016429); at q = 1 its limit, the entropy in nats.

    >>> tsallis_entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), 2.0)
    tensor([0.5000, 0.0000])
    """
    if q == 1:
        return torch.special.entr(probs_TE).sum(-1)
    return (1 - probs_TE.pow(q).sum(-1)) / (q - 1)
