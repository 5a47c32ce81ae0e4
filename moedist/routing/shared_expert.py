"""SharedExpert: top-k routing beside experts that see every token, the latter scaled by a learned gate."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from moedist.config import RouterConfig
from moedist.routing.base import Assignment, RouterInput, router_logits
from moedist.routing.topk import TopKRouter


class SharedExpertRouter(TopKRouter):
    """Shared experts (DeepSeekMoE, Dai et al. 2024, arXiv 2401.06066, section 3.2) with the sigmoid gate of Qwen1.5-MoE.

    The shared experts are part of the layer (`model.shared_experts`), live on every rank and are never dispatched.
    """

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, config, sequence)
        self.shared_gate = nn.Parameter(torch.empty(1, width))

    def forward(self, inputs: RouterInput) -> Assignment:
        gate_T1 = torch.sigmoid(router_logits(inputs.x_GSD, self.shared_gate))
        return dataclasses.replace(super().forward(inputs), shared_gate_T1=gate_T1)
