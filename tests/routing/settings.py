"""What each router needs beside the defaults, where tests go over all of them."""

from __future__ import annotations

import math
from typing import Any

# where a router does all that it can in a training of two dozen steps
GIVEN: dict[str, dict[str, dict[str, Any]]] = {
    "switch": {"model": {"top_k": 1}},
    "shared_expert": {"model": {"shared_experts": 1}},
    "deepseek_moe": {"model": {"shared_experts": 1, "experts": 16, "top_k": 4, "expert_hidden": 8}},
    "loss_free": {"router": {"options": {"update_rate": 0.01, "sequence_loss": 0.001}}},
    "group_limited": {"router": {"options": {"update_rate": 0.01}}},
    "sinkhorn": {"router": {"options": {"fraction": 0.5}}},
    "comet": {"router": {"options": {"permutation_steps": 10}}},
    "progressive": {"router": {"options": {"steps": 16}}},
    "sigma_moe": {"router": {"options": {"expert_dropout": 0.2}}},
    "recurrent": {"router": {"options": {"state": 6}}},
    "rexmoe": {"model": {"pool_layers": 2, "experts": 16}, "router": {"options": {"steps": 16}}},
}


def options_of(name: str) -> dict[str, dict[str, Any]]:
    """Sections of a configuration: `model` and `router`."""
    return GIVEN.get(name, {})


def fitting_options(name: str, experts: int, top_k: int) -> dict[str, Any]:
    """`router.options` that go with any number of experts, and let as much happen in one step as can."""
    if name == "grouped":
        return {"groups": math.gcd(experts, top_k)}
    if name == "group_limited":
        groups = max(n for n in range(1, experts + 1) if experts % n == 0 and n * n <= experts)
        return {"groups": groups, "top_groups": -(-top_k * groups // experts), "sequence_loss": 0.4}
    return {
        "loss_free": {"sequence_loss": 0.4}, "sinkhorn": {"fraction": 1.0}, "sigma_moe": {"expert_dropout": 0.3},
        "comet": {"permutation_steps": 3 * (experts % 2)},  # while experts' places are learned, and after
        "progressive": {"start": experts, "steps": 2}, "null_experts": {"null_experts": 1 + experts // 2},
        "recurrent": {"state": 6},
    }.get(name, {})
