"""The activations of experts, forward and backward into given memory."""

from __future__ import annotations

from typing import Sequence

import torch

ACTIVATIONS = {"swiglu": 2, "gelu": 1}  # pre-activations per hidden neuron
aten = torch.ops.aten


def activate(h: Sequence[torch.Tensor], out: torch.Tensor, activation: str) -> None:
    """out = silu(gate) * up of h = (gate, up) for swiglu, gelu (tanh form) of h = (up,)."""
    if activation == "swiglu":
        gate, up = h
        aten.silu.out(gate, out=out)
        out.mul_(up)
    else:
        aten.gelu.out(h[0], approximate="tanh", out=out)


def activate_backward(h: Sequence[torch.Tensor], a: torch.Tensor, grad_a: torch.Tensor, grad_h: Sequence[torch.Tensor],
                      activation: str) -> None:
    """Fill `grad_h`, and recompute the activation into `a` on the way: cheaper than having kept it. Spoils `grad_a`."""
    if activation == "swiglu":
        (gate, up), (grad_gate, grad_up) = h, grad_h
        aten.silu.out(gate, out=a)
        torch.mul(grad_a, a, out=grad_up)
        a.mul_(up)
        aten.silu_backward.grad_input(grad_a.mul_(up), gate, grad_input=grad_gate)
    else:
        aten.gelu.out(h[0], approximate="tanh", out=a)
        aten.gelu_backward.grad_input(grad_a, h[0], approximate="tanh", grad_input=grad_h[0])
