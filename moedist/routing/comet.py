"""Comet: K binary trees that learn to send a token to one leaf each, and which expert sits at which leaf."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from moedist.config import RouterConfig, key
from moedist.errors import ConfigError
from moedist.routing.base import Assignment, Router, RouterInput, entropy_sum, router_logits, rows_of_tokens
from moedist.routing.sinkhorn import transport_plan

NOTHING = 2**-24  # rows of less weight, which float32 would round away beside the others, are not sent
FIRST_TEMPERATURE, LAST_TEMPERATURE, SCALINGS = 1e-1, 1e-2, 20  # of the search, for logits of the usual initial size


@dataclass(frozen=True)
class CometOptions:
    gamma: float = key(1.0, "a split is soft where its score is within half of this of 0")
    entropy_loss: float = key(0.01, "weight of the entropy of leaves, which makes splits hard and tokens few experts'")
    permutation_steps: int = key(100, "first steps, in which the places of experts at leaves are learned, and a token goes to "
                                      "all experts (0: expert i is at leaf i)")


class CometRouter(Router):
    """COMET (Ibrahim et al. 2023, KDD, arXiv 2306.02824): a differentiable gate of K trees with permutation local search.

    Each of K trees has E leaves and at its E - 1 inner nodes a smooth step (Hazimeh et al. 2020, arXiv 2002.07772) of a linear
    score, exactly 0 or 1 beyond `gamma` / 2; v is the product of a leaf's way, and weights are v * exp(leaf score) over their
    sum in all trees. An entropy loss drives v to 0 and 1, so that K leaves at most are left; before that a token goes to as
    many as E. The softmax is over what is live: no top-k, no scaling.

    Their permutation local search: for `permutation_steps` steps the experts at each tree's leaves are given by a
    doubly stochastic matrix, learned by gradient and made hard by a falling temperature; then the nearest permutation (linear
    assignment) is kept, as state of the model. The temperatures are ours.
    """

    Options = CometOptions

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, config, sequence)
        self.split_weight = nn.Parameter(torch.empty(top_k * max(experts - 1, 1), width))
        self.leaf_weight = nn.Parameter(torch.empty(top_k * experts, width))
        self.place_logits = nn.Parameter(torch.empty(top_k, experts, experts)) if self.options.permutation_steps else None
        self.register_buffer("permutation", torch.arange(experts).repeat(top_k, 1))  # [K, E] expert at each leaf
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def check(self) -> None:
        o = self.options
        if o.gamma <= 0 or o.entropy_loss < 0 or o.permutation_steps < 0:
            raise ConfigError(f"router.options: gamma is {o.gamma:g} (above 0), entropy_loss {o.entropy_loss:g} and "
                              f"permutation_steps {o.permutation_steps} (0 or more); one of them is out of its range")

    def loss_weights(self) -> dict[str, float]:
        return super().loss_weights() | {"entropy_loss": self.options.entropy_loss}

    def most_rows_per_token(self) -> float:
        return float(self.experts)

    def forward(self, inputs: RouterInput) -> Assignment:
        k, e = self.top_k, self.experts
        splits_TKN = smooth_step(router_logits(inputs.x_GSD, self.split_weight), self.options.gamma).unflatten(1, (k, -1))
        reach_TKE = leaf_reach(splits_TKN, e)
        scores_TKE = router_logits(inputs.x_GSD, self.leaf_weight).unflatten(1, (k, e))
        live_TKE = reach_TKE > 0
        top_T11 = scores_TKE.detach().masked_fill(~live_TKE, -torch.inf).amax((1, 2), keepdim=True)
        parts_TKE = reach_TKE * (scores_TKE - top_T11).masked_fill(~live_TKE, -torch.inf).exp()
        parts_TKE = parts_TKE / parts_TKE.sum((1, 2), keepdim=True)
        weights_TE = self._at_experts(parts_TKE, inputs.training)
        sorted_TE, experts_TE = weights_TE.sort(-1, descending=True)
        aux = {}
        if self.options.entropy_loss:
            aux["entropy_loss"] = torch.special.entr(reach_TKE.clamp(min=1e-6)).sum()
        return rows_of_tokens(inputs, experts_TE, sorted_TE, e, self.config.capacity_factor or 0.0, sorted_TE > NOTHING, k,
                              prob_sum_E=weights_TE.sum(0) if self.config.balance_loss else None, aux_losses=aux,
                              stats={"entropy": entropy_sum(weights_TE)})

    def _at_experts(self, parts_TKE: torch.Tensor, training: bool) -> torch.Tensor:
        """[T, E] of experts, from what leaves have."""
        done, last = int(self.steps), self.options.permutation_steps
        if done >= last:
            places = self.permutation.flatten().expand(len(parts_TKE), -1)
            return parts_TKE.new_zeros(len(parts_TKE), self.experts).scatter_add(1, places, parts_TKE.flatten(1))
        temperature = FIRST_TEMPERATURE * (LAST_TEMPERATURE / FIRST_TEMPERATURE) ** (done / max(last - 1, 1))
        if training and done == last - 1:  # here, not after the step: ZeRO-3 has all of a weight only while it is used
            self.permutation.copy_(nearest_permutations(self.place_logits))
        places_KEE = transport_plan(self.place_logits.to(parts_TKE) / temperature, SCALINGS)
        with torch.autocast(parts_TKE.device.type, enabled=False):
            return parts_TKE.flatten(1) @ places_KEE.flatten(0, 1)

    @torch.no_grad()
    def after_step(self, demand_E: torch.Tensor) -> None:
        """Count the steps of the search."""
        self.steps += 1


def smooth_step(x: torch.Tensor, gamma: float) -> torch.Tensor:
    """0 up to -gamma / 2, 1 from gamma / 2 on, a cubic between (Hazimeh et al. 2020, arXiv 2002.07772)."""
    x = (x / gamma).clamp(-0.5, 0.5)
    return (1.5 - 2 * x * x) * x + 0.5


def leaf_reach(splits_TKN: torch.Tensor, leaves: int) -> torch.Tensor:
    """[T, K, E] how much of a token comes to each leaf of a tree in heap order (children of node i are 2i + 1 and 2i + 2,
    nodes E - 1 and beyond are leaves), from the part that every inner node sends to its first child.

    >>> leaf_reach(torch.tensor([[[1.0, 0.25]]]), 3)  # node 1 has leaves 3 and 4; node 2 is a leaf
    tensor([[[0.0000, 0.2500, 0.7500]]])
    """
    level = splits_TKN.new_ones(*splits_TKN.shape[:2], 1)
    first, found = 0, []
    while True:
        inner = max(0, min(level.shape[2], leaves - 1 - first))
        found.append(level[:, :, inner:])
        if not inner:
            return torch.cat(found, 2)
        left = level[:, :, :inner] * splits_TKN[:, :, first:first + inner]
        first += level.shape[2]
        level = torch.stack([left, level[:, :, :inner] - left], 3).flatten(2)


def nearest_permutations(logits_KEE: torch.Tensor) -> torch.Tensor:
    """int64 [K, E]: for each matrix the permutation of largest sum, as the column of every row."""
    found = [linear_sum_assignment(matrix, maximize=True)[1] for matrix in logits_KEE.detach().double().cpu().numpy()]
    return torch.stack([torch.from_numpy(columns) for columns in found])
