"""How much two predictions of the same tokens differ, in chunks, so that no [T, V] logits exist as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from moedist.model.loss import IGNORE


def consistency_loss_sum(first_TD: torch.Tensor, second_TD: torch.Tensor, head_VD: torch.Tensor, targets_T: torch.Tensor,
                         chunk: int = 1024) -> torch.Tensor:
    """Sum over tokens of (KL(p || q) + KL(q || p)) / 2 = sum_v (p - q) (log p - log q) / 2, in float32 (or float64).

    The consistency regulariser of THOR (Zuo et al. 2021, arXiv 2110.04260, eq. 5).

    Args:
        first_TD, second_TD: final hidden states, which `head_VD` turns into the logits of p and q.
        targets_T: tokens whose target is `IGNORE` count nothing.
        chunk: tokens whose logits exist at once.
    """
    return _ChunkedSymmetricKL.apply(first_TD, second_TD, head_VD, targets_T, chunk)


class _ChunkedSymmetricKL(torch.autograd.Function):
    """Forward computes the gradients too, as in `moedist.model.loss`.

    With D = log p - log q the gradient by the logits of p is (p (D - KL(p || q)) + p - q) / 2, and the mirror image by q's.
    """

    @staticmethod
    def forward(ctx: Any, first: torch.Tensor, second: torch.Tensor, head: torch.Tensor, targets: torch.Tensor,
                chunk: int) -> torch.Tensor:
        accumulate = torch.float64 if first.dtype == torch.float64 else torch.float32
        weight = head.to(first.dtype)
        need = any(ctx.needs_input_grad[:3])
        total = torch.zeros((), dtype=accumulate, device=first.device)
        grads = (torch.empty_like(first), torch.empty_like(second)) if need else (None, None)
        grad_head = torch.zeros(head.shape, dtype=accumulate, device=first.device) if need else None
        for start in range(0, len(first), chunk):
            part = slice(start, start + chunk)
            valid = (targets[part] != IGNORE).unsqueeze(1).to(accumulate)
            log_p, log_q = (F.log_softmax((h[part] @ weight.t()).to(accumulate), dim=-1) for h in (first, second))
            p, q, apart = log_p.exp(), log_q.exp(), log_p - log_q
            total += ((p - q) * apart * valid).sum() / 2
            if need:
                for h, grad_h, mine, other, sign in ((first, grads[0], p, q, 1), (second, grads[1], q, p, -1)):
                    divergence = (mine * apart).sum(-1, keepdim=True) * sign
                    grad = ((mine * (sign * apart - divergence) + mine - other) * (valid / 2)).to(h.dtype)
                    torch.mm(grad, weight, out=grad_h[part])
                    grad_head += grad.t() @ h[part]
        ctx.grads = (*grads, grad_head, head.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        first, second, head, head_dtype = ctx.grads
        ctx.grads = None
        by_hidden = (g.mul_(grad.to(g.dtype)) for g in (first, second))
        return (*by_hidden, head.mul_(grad).to(head_dtype), None, None)
