"""Load-balancing loss over the global batch."""

from __future__ import annotations

import torch


def balance_loss_sum(prob_sum_E: torch.Tensor, global_demand_E: torch.Tensor) -> torch.Tensor:
    """E * sum_e f_e * P_e, where f_e is the global share of rows that want expert e and P_e the summed probability here.

    The loss of Switch (Fedus et al. 2021, arXiv 2101.03961, eq. 4) with f counted over all ranks (Qiu et al. 2025, arXiv
    2501.11873): summed over ranks and divided by the global number of tokens it is 1 at perfect balance, and it does not
    depend on how the batch is spread. f has no gradient.

    Args:
        prob_sum_E: router probabilities summed over this rank's tokens.
        global_demand_E: rows that want each expert, over all ranks.
    """
    total = global_demand_E.sum().clamp(min=1)
    fraction_E = global_demand_E.to(prob_sum_E) / total
    return prob_sum_E.numel() * (fraction_E * prob_sum_E).sum()
