"""A dense feed-forward: SwiGLU (Shazeer 2020, arXiv 2002.05202) or GELU."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from moedist.model.grouped_ffn import ACTIVATIONS


class FeedForward(nn.Module):
    """down(silu(gate x) * up x), or down(gelu(up x)); no biases. Gate and up are one matrix [g*F, D]."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.activation = activation
        self.w_in = nn.Linear(width, ACTIVATIONS[activation] * hidden, bias=False)
        self.w_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.w_in(x)
        if self.activation == "gelu":
            return self.w_out(F.gelu(h, approximate="tanh"))
        gate, up = h.chunk(2, dim=-1)
        return self.w_out(F.silu(gate) * up)
