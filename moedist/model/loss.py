"""Next-token loss in chunks, so that the [T, V] logits never exist as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

IGNORE = -100


def next_token_loss_sum(hidden_TD: torch.Tensor, head_VD: torch.Tensor, targets_T: torch.Tensor,
                        chunk: int = 1024) -> torch.Tensor:
    """Sum over tokens of -log p(target), in float32 (float64 for float64 input).

    Args:
        hidden_TD: final hidden states; head_VD: output projection, cast to their dtype.
        targets_T: int64 next tokens; `IGNORE` (-100) counts nothing.
        chunk: tokens whose logits exist at once.
    """
    gradients = torch.is_grad_enabled() and (hidden_TD.requires_grad or head_VD.requires_grad)
    return _ChunkedCrossEntropy.apply(hidden_TD, head_VD, targets_T, chunk, gradients)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients too: the logits are at hand, and the loss is a sum, so they only need scaling."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, chunk: int,
                need: bool) -> torch.Tensor:
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        weight = head.to(hidden.dtype)
        total = torch.zeros((), dtype=accumulate, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need else None
        grad_head = torch.zeros(head.shape, dtype=accumulate, device=hidden.device) if need else None
        for start in range(0, len(hidden), chunk):
            h, t = hidden[start:start + chunk], targets[start:start + chunk]
            log_probs = F.log_softmax((h @ weight.t()).to(accumulate), dim=-1)
            total += F.nll_loss(log_probs, t, ignore_index=IGNORE, reduction="sum")
            if need:
                grad = log_probs.exp_()
                valid = (t != IGNORE).unsqueeze(1)
                grad.scatter_add_(1, t.clamp(min=0).unsqueeze(1), -valid.to(grad.dtype)).mul_(valid)
                grad = grad.to(hidden.dtype)
                torch.mm(grad, weight, out=grad_hidden[start:start + chunk])
                grad_head += grad.t() @ h
        ctx.grads = (grad_hidden, grad_head, head.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        grad_hidden, grad_head, head_dtype = ctx.grads
        ctx.grads = None
        return grad_hidden.mul_(grad.to(grad_hidden.dtype)), grad_head.mul_(grad).to(head_dtype), None, None, None
