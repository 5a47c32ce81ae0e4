"""Inter-layer expert affinity: what the expert of a token in one layer tells of its expert in the next.

After Yao et al. 2024, "Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts Model Inference" (arXiv
2401.08383, section 4.1): the conditional distribution of the next layer's expert, here of tokens with any number of experts.

G sequences of S tokens; E experts in one layer, N in the next.
"""

from __future__ import annotations

from typing import Any

import torch


def joint_mass(active_GSE: torch.Tensor, next_GSN: torch.Tensor) -> torch.Tensor:
    """float64 [E, N]: tokens by (expert, next expert); a token with several gives each pair an equal part of 1.

    A token without an expert in either layer counts nothing. Sums over sequences add up.
    """
    def parts(active: torch.Tensor) -> torch.Tensor:
        active_TE = active.flatten(0, 1).double()
        return active_TE / active_TE.sum(1, keepdim=True).clamp(min=1)

    return parts(active_GSE).t() @ parts(next_GSN)


def conditional(joint_EN: torch.Tensor) -> torch.Tensor:
    """[E, N] P(next expert | expert); rows of experts that no token has are 0."""
    return joint_EN / joint_EN.sum(1, keepdim=True).clamp(min=torch.finfo(joint_EN.dtype).tiny)


def entropy_bits(mass: torch.Tensor) -> float:
    """Entropy of a distribution that need not add up to 1, in bits; 0 where there is nothing."""
    total = float(mass.sum())
    return float(torch.special.entr(mass.double() / total).sum()) / _LN2 if total else 0.0


def affinity(joint_EN: torch.Tensor) -> dict[str, Any]:
    """A summary of one pair of layers.

    Returns:
        mutual_information: bits, H(next) - H(next | this); normalised: over H(next), the share of the next layer's choice
        that this layer's tells (Theil's U, 0 to 1); bias: bits that so few tokens show of two layers that know nothing of
        each other, (E - 1)(N - 1) / (2 T ln 2) over experts in use (Miller 1955), left in both; top: probability that the
        likeliest next expert given this one is right, averaged over tokens; chance: the same without knowing this one, the
        share of the most frequent next expert; tokens: T.
    """
    tokens = float(joint_EN.sum())
    this, following = entropy_bits(joint_EN.sum(1)), entropy_bits(joint_EN.sum(0))
    bits = max(0.0, this + following - entropy_bits(joint_EN))
    used = [int((joint_EN.sum(dim) > 0).sum()) for dim in (1, 0)]
    return {"tokens": tokens, "mutual_information": bits, "normalised": bits / following if following else 0.0,
            "bias": max(0, (used[0] - 1) * (used[1] - 1)) / (2 * tokens * _LN2) if tokens else 0.0,
            "top": float(joint_EN.max(1).values.sum()) / tokens if tokens else 0.0,
            "chance": float(joint_EN.sum(0).max()) / tokens if tokens else 0.0}


_LN2 = 0.6931471805599453
