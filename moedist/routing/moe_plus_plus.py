"""MoE++: beside the experts of the model some that need no computing, and scores that remember the layer before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn

from moedist.config import RouterConfig, key
from moedist.errors import ConfigError
from moedist.routing.base import (
    Assignment, Router, RouterInput, demand, entropy_sum, even_share, router_dtype, router_logits, within_capacity, z_loss,
)


@dataclass(frozen=True)
class MoEPlusPlusOptions:
    zero: int = key(1, "experts that give nothing")
    copy: int = key(1, "experts that give the token itself")
    constant: int = key(2, "experts that give a learned vector, mixed with the token by a learned gate")
    tau: float = key(0.75, "rows of an expert of the model over those of one that needs no computing, at balance")
    residual: bool = key(True, "add the scores of the layer before, by a learned matrix, to those of a layer")


class MoEPlusPlusRouter(Router):
    """MoE++ (Jin et al. 2024, arXiv 2410.07348, section 3): a token takes its K best of E experts and Z free ones.

    Free experts (section 3.1) give 0, x, or a1 x + a2 v with (a1, a2) = softmax(W x) and a learned vector v. They are on
    every rank and their part of the output is added without dispatch. Scores are W x + R s where s are the scores of the MoE
    layer before (gating residuals, section 3.2; not in the first), and are handed on. The balance loss weighs an expert of the
    model by 1 and a free one by tau (section 3.3): it is balanced where their rows are as tau to 1, so a small tau saves more.
    Here that is the loss of `balance_loss_sum` with these targets. A capacity is that of their section 3.3 for the experts of
    the model; free experts have none, since what they take costs nothing.
    """

    Options = MoEPlusPlusOptions
    balances = True

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, config, sequence)
        o = self.options
        self.free_experts = o.zero + o.copy + o.constant
        self.weight = nn.Parameter(torch.empty(experts + self.free_experts, width))
        self.residual = nn.Parameter(torch.empty(len(self.weight), len(self.weight))) if o.residual else None
        if o.constant:
            self.vectors = nn.Parameter(torch.empty(o.constant, width))
            self.mixing = nn.Parameter(torch.empty(2 * o.constant, width))

    def check(self) -> None:
        o = self.options
        if min(o.zero, o.copy, o.constant) < 0 or o.zero + o.copy + o.constant == 0:
            raise ConfigError(f"router.options: zero={o.zero}, copy={o.copy}, constant={o.constant} experts that need no "
                              "computing; give 0 or more of each, and one at least")
        if o.tau <= 0:
            raise ConfigError(f"router.options: tau is {o.tau:g}; give a number above 0, such as 0.75")

    def expected_rows_per_token(self) -> float:
        """Rows that are sent, once loads are balanced."""
        return self.top_k * float(self.share)

    @property
    def share(self) -> float:
        """Part of the choices that are experts of the model, at balance."""
        return self.options.tau * self.experts / (self.options.tau * self.experts + self.free_experts)

    def balance_targets(self) -> Optional[torch.Tensor]:
        """Of the experts of the model, then of the free ones."""
        of_model = self.targets_E if self.targets_E is not None else \
            torch.full((self.experts,), 1 / self.experts, dtype=torch.float64)
        free = torch.full((self.free_experts,), (1 - self.share) / self.free_experts, dtype=torch.float64)
        return torch.cat([self.share * of_model, free])

    def forward(self, inputs: RouterInput) -> Assignment:
        g, s, _ = inputs.x_GSD.shape
        logits_TA = router_logits(inputs.x_GSD, self.weight)  # A = E + Z, those of the model first
        if self.residual is not None and inputs.carried is not None:
            with torch.autocast(logits_TA.device.type, enabled=False):
                logits_TA = logits_TA + inputs.carried.to(logits_TA.dtype) @ self.residual.to(logits_TA.dtype).t()
        probs_TA = logits_TA.softmax(-1)
        chosen_TK = probs_TA.topk(self.top_k, dim=-1).indices
        weights_TK = probs_TA.gather(1, chosen_TK)
        if self.config.normalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        sent_TK = chosen_TK < self.experts
        stats = {"entropy": entropy_sum(probs_TA)}
        if self.config.capacity_factor:
            capacity = even_share(s, self.expected_rows_per_token(), self.experts, self.config.capacity_factor)
            fits_TK = within_capacity(chosen_TK.view(g, s, self.top_k), len(self.weight), capacity).reshape(chosen_TK.shape)
            stats["dropped_rows"] = (sent_TK & ~fits_TK).sum()
            kept_TK = sent_TK & fits_TK
        else:
            kept_TK = sent_TK
        token_ids_TK = torch.arange(len(chosen_TK), device=chosen_TK.device).unsqueeze(1).expand_as(chosen_TK)
        return Assignment(token_ids_TK[kept_TK], chosen_TK[kept_TK], weights_TK[kept_TK],
                          demand_E=demand(chosen_TK, len(self.weight)),
                          prob_sum_E=probs_TA.sum(0) if self.config.balance_loss else None,
                          aux_losses=z_loss(logits_TA, self.config), stats=stats,
                          direct_TD=self._free(inputs, torch.zeros_like(probs_TA).scatter(1, chosen_TK, weights_TK)),
                          carried=logits_TA)

    def _free(self, inputs: RouterInput, weights_TA: torch.Tensor) -> torch.Tensor:
        """[T, D] what tokens get from free experts."""
        o, dtype = self.options, router_dtype(inputs.x_GSD)
        x_TD = inputs.x_GSD.flatten(0, 1).to(dtype)
        _, _, copies, constants = weights_TA.split([self.experts, o.zero, o.copy, o.constant], dim=1)
        of_itself_T = copies.sum(1)
        if not o.constant:
            return of_itself_T.unsqueeze(1) * x_TD
        mix_TC2 = router_logits(inputs.x_GSD, self.mixing).unflatten(1, (o.constant, 2)).softmax(-1)
        of_itself_T = of_itself_T + (constants * mix_TC2[..., 0]).sum(1)
        with torch.autocast(x_TD.device.type, enabled=False):
            # a view of the weights is saved for the backward pass: of the parameter itself ZeRO-3 would leave nothing
            vectors_CD = self.vectors.view(o.constant, -1).to(dtype)
            return of_itself_T.unsqueeze(1) * x_TD + (constants * mix_TC2[..., 1]) @ vectors_CD
