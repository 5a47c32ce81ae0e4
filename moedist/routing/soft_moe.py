"""SoftMoE: experts process weighted averages of a sequence's tokens instead of tokens."""

from __future__ import annotations

import torch
from torch import nn

from moedist.config import RouterConfig
from moedist.routing.base import Assignment, Router, RouterInput, entropy_sum, even_share, router_logits


class SoftMoERouter(Router):
    """Soft MoE (Puigcerver et al. 2023, arXiv 2308.00951, section 2.1), within each sequence.

    A slot reads `mix_in` = softmax over tokens, a token reads back `mix_out` = softmax over slots. Every expert has
    ceil(`capacity_factor` * S * K / E) slots, S the training length, whatever the length of the sequence at hand.
    Not causal: a slot averages later tokens too, so perplexity is optimistic.
    """

    causal = False

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, config, sequence)
        self.slots = even_share(sequence, top_k, experts, config.capacity_factor or 1.0)
        self.weight = nn.Parameter(torch.empty(experts * self.slots, width))

    def most_rows_per_token(self) -> float:
        return self.expected_rows_per_token()

    def expected_rows_per_token(self) -> float:
        return self.slots * self.experts / self.sequence

    def forward(self, inputs: RouterInput) -> Assignment:
        g, s, _ = inputs.x_GSD.shape
        slots, m = self.slots, self.slots * self.experts
        logits_GSM = router_logits(inputs.x_GSD, self.weight).view(g, s, m)
        mix_out_GSM = logits_GSM.softmax(2)
        mix_in_GMS = logits_GSM.softmax(1).transpose(1, 2)
        rows = torch.arange(g * m, device=logits_GSM.device)
        return Assignment(
            rows, (rows % m) // slots, torch.ones_like(rows, dtype=logits_GSM.dtype),
            demand_E=rows.new_full((self.experts,), g * slots), mix_in=mix_in_GMS, mix_out=mix_out_GSM,
            stats={"entropy": entropy_sum(mix_out_GSM.unflatten(2, (self.experts, slots)).sum(3))})
