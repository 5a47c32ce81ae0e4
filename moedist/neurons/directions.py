"""What a neuron reads from the residual stream and what it writes to it: dimensions, subspaces, words.

D model width, J neurons, V vocabulary, k entries shown.
"""

from __future__ import annotations

import torch

from moedist.compress import Expert


def reads(expert: Expert, norm_D: torch.Tensor) -> torch.Tensor:
    """[J, D]: share of every residual dimension in what each neuron reads; rows sum to 1.

    The weights see the stream after a norm that scales each dimension, so `norm_D`, its weight, counts. Gate and up
    multiply: each is taken by direction alone, and the two shares are averaged.
    """
    matrices = read_weights(expert, norm_D)
    return sum(_shares(matrix) for matrix in matrices) / len(matrices)


def writes(expert: Expert) -> torch.Tensor:
    """[J, D]: share of every residual dimension in what each neuron writes; rows sum to 1."""
    return _shares(_wide(expert.down))


def read_weights(expert: Expert, norm_D: torch.Tensor) -> list[torch.Tensor]:
    """Gate, if there is one, and up, as the residual stream sees them: [J, D] each."""
    return [_wide(matrix) * norm_D for part, matrix in expert.parts.items() if part != "down"]


def vocabulary(directions_JD: torch.Tensor, head_VD: torch.Tensor, norm_D: torch.Tensor) -> torch.Tensor:
    """[J, V]: how far a step of the residual stream in each direction moves every token's logit.

    The direct path to the output (Geva et al. 2022, arXiv 2203.14680, section 3): direction times the last norm's weight
    `norm_D` times the output embedding. The softmax does not see what all logits share, nor do we know the size of a step:
    so each row is given in standard deviations from its mean. A neuron that fires negatively moves them the other way.
    """
    logits = _wide((directions_JD * norm_D).to(head_VD.dtype) @ head_VD.t())
    centred = logits - logits.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=torch.finfo(centred.dtype).tiny)


def largest(row: torch.Tensor, k: int) -> list[tuple[int, float]]:
    """The k largest entries as (index, value), largest first; equal ones by index.

    >>> largest(torch.tensor([0.5, 2.0, 0.5, -3.0]), 3)
    [(1, 2.0), (0, 0.5), (2, 0.5)]
    """
    values, order = row.cpu().sort(descending=True, stable=True)
    return list(zip(order[:k].tolist(), values[:k].tolist()))


def basis(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """[D, r] orthonormal: the directions that hold most of the energy of rows [J, D], r = min(rank, J, D)."""
    rank = min(rank, *rows.shape)
    return torch.linalg.eigh(_wide(rows).t() @ _wide(rows)).eigenvectors.flip(1)[:, :rank]


def mixture(shares: torch.Tensor, weights_J: torch.Tensor) -> torch.Tensor:
    """Shares [J, n] averaged over neurons by weight; evenly where all weights are zero (an expert without tokens)."""
    weights = weights_J.to(shares.dtype) if weights_J.any() else shares.new_ones(len(shares))
    return (weights / weights.sum()) @ shares


def _shares(rows: torch.Tensor) -> torch.Tensor:
    squares = rows.square()
    return squares / squares.sum(1, keepdim=True).clamp(min=torch.finfo(squares.dtype).tiny)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
