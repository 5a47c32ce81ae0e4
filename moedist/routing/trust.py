"""Which experts of a token its router trusts most: they alone are worth restoring to full precision."""

from __future__ import annotations

import torch


def most_trusted(token_ids_N: torch.Tensor, weights_N: torch.Tensor, n: int) -> torch.Tensor:
    """bool [N]: whether a row is among the n of its token with the largest weights; of equal ones, the first.

    Args:
        token_ids_N: int64, ascending.
        weights_N: the router's.

    >>> most_trusted(torch.tensor([0, 0, 0, 2, 2]), torch.tensor([0.2, 0.5, 0.5, 0.1, 0.9]), 1).tolist()
    [False, True, False, False, True]
    """
    by_weight = weights_N.detach().sort(descending=True, stable=True).indices
    order = by_weight[token_ids_N[by_weight].sort(stable=True).indices]  # by token, within one by weight
    tokens_N = token_ids_N.contiguous()
    starts = torch.searchsorted(tokens_N, tokens_N)
    place = torch.arange(len(token_ids_N), device=token_ids_N.device) - starts  # the k-th of its token
    return torch.empty_like(order, dtype=torch.bool).index_copy_(0, order, place < n)
