"""Gathers, permutations and segment sums with exact, cheap gradients.

The gradient of a gather is a sum over the rows that share a source. `index_add` would do it one row at a time; knowing
which rows belong to which token turns it into one segment sum (`embedding_bag`), 20 times faster on a CPU, and with a
fixed order of summation.

T tokens, N rows, D width.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch.nn import functional as F

EMBEDDING_BAG_DEVICES = ("cpu", "cuda")
CHUNK = 2048


def segment_sum(rows_ND: torch.Tensor, index_N: torch.Tensor, starts_T: torch.Tensor,
                weights_N: Optional[torch.Tensor] = None) -> torch.Tensor:
    """[T, D]: for each token t the sum of weights[i] * rows[index[i]] over i in starts[t] .. starts[t + 1]."""
    if rows_ND.device.type in EMBEDDING_BAG_DEVICES and len(index_N):
        return F.embedding_bag(index_N, rows_ND, starts_T, mode="sum", per_sample_weights=weights_N)
    lengths = torch.diff(starts_T, append=starts_T.new_tensor([len(index_N)]))
    token_N = torch.arange(len(starts_T), device=starts_T.device).repeat_interleave(lengths)
    rows = rows_ND.index_select(0, index_N)
    rows = rows if weights_N is None else rows * weights_N.unsqueeze(1)
    return rows.new_zeros(len(starts_T), rows_ND.shape[1]).index_add_(0, token_N, rows)


class GatherRows(torch.autograd.Function):
    """rows[i] = x[token[i]]; backward sums the gradients of a token's rows.

    Args of `apply`: x_TD; token_N, the source of each row; by_token_N, rows listed token by token; starts_T, where each
    token's rows start in that list.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, token_N: torch.Tensor, by_token_N: torch.Tensor,
                starts_T: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(by_token_N, starts_T)
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple:
        return segment_sum(grad_ND.contiguous(), *ctx.saved_tensors), None, None, None


class SumRows(torch.autograd.Function):
    """y[t] = sum of the rows of token t; backward hands each row its token's gradient. The adjoint of `GatherRows`.

    Args of `apply`: rows_ND; token_N, by_token_N, starts_T as there.
    """

    @staticmethod
    def forward(ctx: Any, rows_ND: torch.Tensor, token_N: torch.Tensor, by_token_N: torch.Tensor,
                starts_T: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(token_N)
        return segment_sum(rows_ND, by_token_N, starts_T)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple:
        return grad_TD.index_select(0, ctx.saved_tensors[0]), None, None, None


class PermuteRows(torch.autograd.Function):
    """rows[i] = x[index[i]] for a permutation; backward is the inverse permutation, again a gather."""

    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, index_N: torch.Tensor, inverse_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse_N)
        return x_ND.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple:
        return grad_ND.index_select(0, ctx.saved_tensors[0]), None, None


class WeightedSum(torch.autograd.Function):
    """y[t] = sum of weights[i] * rows[by_token[i]] over the rows of token t; exact gradients for rows and weights.

    Args of `apply`: rows_ND; weights_N in the order of `by_token`; by_token_N; starts_T; token_N, the token of each row.
    """

    @staticmethod
    def forward(ctx: Any, rows_ND: torch.Tensor, weights_N: torch.Tensor, by_token_N: torch.Tensor,
                starts_T: torch.Tensor, token_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows_ND, weights_N, by_token_N, token_N)
        return segment_sum(rows_ND, by_token_N, starts_T, weights_N.to(rows_ND.dtype))

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple:
        rows_ND, weights_N, by_token_N, token_N = ctx.saved_tensors
        grad_TD = grad_TD.contiguous()
        row_weights_N1 = torch.empty_like(weights_N).index_copy_(0, by_token_N, weights_N).to(rows_ND.dtype).unsqueeze(1)
        grad_rows, dots_N = torch.empty_like(rows_ND), rows_ND.new_empty(len(rows_ND))
        for start in range(0, len(rows_ND), CHUNK):  # a few rows at a time: three passes over what is still in cache
            part = slice(start, start + CHUNK)
            torch.index_select(grad_TD, 0, token_N[part], out=grad_rows[part])
            torch.linalg.vecdot(rows_ND[part], grad_rows[part], out=dots_N[part])
            grad_rows[part].mul_(row_weights_N1[part])
        return grad_rows, dots_N.index_select(0, by_token_N).to(weights_N.dtype), None, None, None
