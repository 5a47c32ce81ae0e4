"""SigmaMoE: sigmoid scores without competition, evened out by entropy and by dropping experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from moedist.config import RouterConfig, key
from moedist.errors import ConfigError
from moedist.routing.base import Assignment, Router, RouterInput, entropy_sum, router_logits, rows_of_tokens
from moedist.routing.noise import uniform


@dataclass(frozen=True)
class SigmaMoEOptions:
    entropy_loss: float = key(0.001, "weight of the negative entropy of a sequence's mean probabilities")
    expert_dropout: float = key(0.05, "part of the experts that a token may not choose in a training step")


class SigmaMoERouter(Router):
    """sigma-MoE (Csordas et al. 2023, arXiv 2310.10837): scores sigmoid(x W), the K best, weights the scores as they
    are: one expert's does not push down another's. Against collapse, the entropy of softmax(x W), averaged over tokens, is
    maximised (theirs over the batch, here over each sequence, so that any number of ranks has the same), and in
    training a token cannot choose some experts, drawn at random: they come last in line.
    """

    Options = SigmaMoEOptions

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, config, sequence)
        self.weight = nn.Parameter(torch.empty(experts, width))

    def check(self) -> None:
        o = self.options
        if o.entropy_loss < 0 or not 0 <= o.expert_dropout < 1:
            raise ConfigError(f"router.options: entropy_loss is {o.entropy_loss:g} (0 or more) and expert_dropout "
                              f"{o.expert_dropout:g} (0 to below 1); one of them is out of its range")

    def loss_weights(self) -> dict[str, float]:
        return super().loss_weights() | {"entropy_loss": self.options.entropy_loss}

    def forward(self, inputs: RouterInput) -> Assignment:
        g, s, _ = inputs.x_GSD.shape
        logits_TE = router_logits(inputs.x_GSD, self.weight)
        scores_TE, probs_TE = logits_TE.sigmoid(), logits_TE.softmax(-1)
        open_TE = scores_TE.detach()
        if inputs.training and self.options.expert_dropout:
            dropped_TE = uniform(inputs.keys_GS.flatten(), self.experts, inputs.seed) < self.options.expert_dropout
            open_TE = open_TE - dropped_TE.to(open_TE)  # below all others, and still in the order of scores
        experts_TK = open_TE.topk(self.top_k, dim=-1).indices
        aux = {}
        if self.options.entropy_loss and s:
            mean_GE = probs_TE.view(g, s, self.experts).mean(1)
            aux["entropy_loss"] = -s * torch.special.entr(mean_GE).sum()
        return rows_of_tokens(inputs, experts_TK, scores_TE.gather(1, experts_TK), self.experts,
                              self.config.capacity_factor or 0.0, aux_losses=aux, stats={"entropy": entropy_sum(probs_TE)})
