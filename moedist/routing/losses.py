"""Load-balancing losses, over the global batch and within a sequence."""

from __future__ import annotations

from typing import Optional

import torch


def balance_loss_sum(prob_sum_E: torch.Tensor, global_demand_E: torch.Tensor,
                     targets_E: Optional[torch.Tensor] = None) -> torch.Tensor:
    """sum_e f_e * P_e / q_e, by default E * sum_e f_e * P_e, where f_e is the global share of rows that want expert e and P_e
    the summed probability here.

    The loss of Switch (Fedus et al. 2021, arXiv 2101.03961, eq. 4) with f counted over all ranks (Qiu et al. 2025, arXiv
    2501.11873): summed over ranks and divided by the global number of tokens it is 1 at perfect balance, and it does not
    depend on how the batch is spread. f has no gradient.

    With targets q it is balanced at f = q: where probabilities follow the rows (P = f) it is sum f^2 / q >= (sum f)^2 = 1 by
    Cauchy and Schwarz, equal to 1 at f = q alone; and its gradient by P, f_e / q_e, is then the same for all experts, which
    moves no softmax. An expert above its target is pushed down by how many times it is above.

    Args:
        prob_sum_E: router probabilities summed over this rank's tokens.
        global_demand_E: rows that want each expert, over all ranks.
        targets_E: part of the rows that each is to get, above 0, summing to one; None: equal parts.
    """
    total = global_demand_E.sum().clamp(min=1)
    fraction_E = global_demand_E.to(prob_sum_E) / total
    if targets_E is None:
        return prob_sum_E.numel() * (fraction_E * prob_sum_E).sum()
    return (fraction_E * prob_sum_E / targets_E.to(prob_sum_E)).sum()


def sequence_balance_loss_sum(probs_GSE: torch.Tensor, chosen_GSE: torch.Tensor) -> torch.Tensor:
    """Sum over sequences of S * E * sum_e f_e * P_e, with f and P of the sequence alone, so that ranks need not talk.

    The complementary sequence-wise loss of DeepSeek-V3 (arXiv 2412.19437, eq. 17-20): f_e is the share of the sequence's
    rows that choose e, P_e the mean of its probability; 1 a token at perfect balance. f has no gradient.

    Args:
        probs_GSE: each token's, summing to one.
        chosen_GSE: bool, or a share of a choice.
    """
    fraction_GE = chosen_GSE.to(probs_GSE).sum(1)
    fraction_GE = fraction_GE / fraction_GE.sum(1, keepdim=True).clamp(min=1)
    return probs_GSE.shape[2] * (fraction_GE.detach() * probs_GSE.sum(1)).sum()
