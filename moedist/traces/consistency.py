"""Local routing consistency: do tokens that stand together go to the same experts?

Liang et al. 2025, "Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert Models" (arXiv
2505.16056): segment routing best performance (SRP, section 2.2 and appendix C.1) and segment cache best hit rate (SCH,
section 2.3).

G sequences of S tokens, E experts; a segment is m tokens in a row of one sequence, at any position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class BestSegments(NamedTuple):
    """SRP, and how many experts that takes: those of a segment over those of a token (the paper's size ratio)."""

    srp: float
    size_ratio: float


def segment_counts(active_GSE: torch.Tensor, m: int) -> torch.Tensor:
    """int64 [G, S - m + 1, E]: how often each expert is active in each segment; no segments where m > S."""
    if m > active_GSE.shape[1]:
        return torch.zeros(len(active_GSE), 0, active_GSE.shape[2], dtype=torch.int64)
    sums = torch.nn.functional.pad(active_GSE.long(), (0, 0, 1, 0)).cumsum(1)
    return sums[:, m:] - sums[:, :-m]


def segment_histogram(active_GSE: torch.Tensor, m: int) -> torch.Tensor:
    """int64 [E, m + 1]: in how many segments each expert is active 0, 1, ..., m times. Sums over sequences add up."""
    experts = active_GSE.shape[2]
    cells = segment_counts(active_GSE, m) + (m + 1) * torch.arange(experts)
    return torch.bincount(cells.flatten(), minlength=experts * (m + 1)).view(experts, m + 1)


def best_segments(histogram_Ef: torch.Tensor) -> BestSegments:
    """SRP of the experts of a histogram together (eq. 6; of one expert, eq. 4).

    A segment router calls each expert active in all m tokens of a segment, or in none. SRP is the best F1 that it can have
    against the real routing, over all experts, segments and tokens:

        max_R  2 sum R(e, p) f(e, p) / sum [m R(e, p) + f(e, p)]

    with f(e, p) how often e is active in segment p. The best R is active where f reaches a threshold (appendix C.3), so
    trying m + 1 of them finds it. 1: experts never change within a segment; 0 where no expert is ever active.

    Args:
        histogram_Ef: [experts, m + 1], of any kind of numbers.
    """
    segments_f = histogram_Ef.double().sum(0)
    m = len(segments_f) - 1
    active_f = segments_f * torch.arange(m + 1)
    hits, chosen = (values.flip(0).cumsum(0).flip(0) for values in (active_f, segments_f))  # where f >= 0, 1, ..., m
    if not active_f.sum():
        return BestSegments(0.0, 0.0)
    f1 = 2 * hits / (m * chosen + active_f.sum())
    best = int(f1.argmax())
    return BestSegments(float(f1[best]), float(m * chosen[best] / active_f.sum()))


def independent_histogram(share_E: torch.Tensor, m: int) -> torch.Tensor:
    """[E, m + 1], adding up to 1 for each expert: the histogram of experts that are as frequent, but active in each token
    whatever they were in others: binomial. Its SRP is what frequencies alone give.

    Args:
        share_E: of the tokens that each expert is active in.
    """
    share_E1 = share_E.double().unsqueeze(1).clamp(0, 1)
    f = torch.arange(m + 1, dtype=torch.float64)
    ways_f = torch.lgamma(torch.tensor(m + 1.0).double()) - torch.lgamma(f + 1) - torch.lgamma(m - f + 1)
    return (ways_f + torch.xlogy(f, share_E1) + torch.xlogy(m - f, 1 - share_E1)).exp()


def cache_hits(active_GSE: torch.Tensor, m: int, size: int) -> int:
    """Of all active (token, expert) pairs, how many find the expert in a cache of `size`; over their number this is SCH.

    For each token the cache loads the experts that are missing, and evicts those that are active the fewest times in the
    segment of m tokens that begins there (of these, the one used least recently, so that m = 1 is an LRU cache). A segment
    is cut off at the end of its sequence. Every sequence begins with the experts that it uses first in the cache: filling it
    is not counted as misses, as in the authors' program. Where a token has more experts than the cache has room, the cache
    keeps those of them that come most.
    """
    g, s, experts = active_GSE.shape
    if not g or not s:
        return 0
    size = min(size, experts)
    active = active_GSE.bool().cpu()
    sums = torch.nn.functional.pad(active.long(), (0, 0, 1, 0)).cumsum(1)
    ahead_GSE = sums[:, torch.arange(s).add(m).clamp(max=s)] - sums[:, :-1]  # in the segment that begins at each token
    names = experts - 1 - torch.arange(experts)  # of equal ones the first
    first_GE = torch.where(active.any(1), active.int().argmax(1), s)  # token of the first use
    held = _largest((s - first_GE) * experts + names, size)
    used_GE = torch.zeros(g, experts, dtype=torch.int64)  # token of the last use, from 1
    hits = 0
    for t in range(s):
        now = active[:, t]
        hits += int((held & now).sum())
        worth = (ahead_GSE[:, t] * (s + 1) + used_GE) * experts + names
        worth = worth + now * (s + 1) ** 2 * experts  # what this token needs stays
        held = _largest(torch.where(held | now, worth, -1), size)
        used_GE[now] = t + 1
    return hits


def _largest(worth_GE: torch.Tensor, size: int) -> torch.Tensor:
    """bool [G, E]: the `size` largest of each row that are not below 0."""
    chosen = torch.zeros_like(worth_GE, dtype=torch.bool).scatter(1, worth_GE.topk(size, dim=1).indices, True)
    return chosen & (worth_GE >= 0)
