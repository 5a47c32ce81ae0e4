"""How evenly experts and ranks are loaded, and how routing changes: from load matrices and lists of routed pairs.

W ranks, E experts. Every rank knows all loads, so nothing here is gathered.
"""

from __future__ import annotations

from typing import Mapping, Sequence

import torch

from moedist.routing import Assignment


def load_balance(load_E: torch.Tensor) -> float:
    """Mean over largest rows of an expert: 1 where all have as many, 1/E where one has all; 0 without rows.

    The reciprocal of OLMo-core's load imbalance, and 1 / (1 + MaxVio) of Wang et al. 2024 (arXiv 2408.15664).

    >>> load_balance(torch.tensor([3, 3, 6, 0]))
    0.5
    """
    load_E = load_E.double()
    return (load_E.mean() / load_E.max()).item() if load_E.sum() else 0.0


def expert_utilisation(load_E: torch.Tensor) -> float:
    """Effective number of experts over E, exp(entropy of the shares of rows) / E; 0 without rows.

    1 where all have as many, k/E where k experts share all rows evenly (Hill 1973, doi 10.2307/1934352, order 1).

    >>> round(expert_utilisation(torch.tensor([5, 5, 0, 0])), 6)
    0.5
    """
    load_E = load_E.double()
    if not load_E.sum():
        return 0.0
    return torch.special.entr(load_E / load_E.sum()).sum().exp().item() / len(load_E)


def layer_balance(load_WE: torch.Tensor, rows_W: Sequence[float], speeds_W: Sequence[float] | None = None) -> dict[str, float]:
    """Imbalance of one layer; empty where it had no rows.

    Args:
        load_WE: rows every rank sent to every expert.
        rows_W: rows every rank's experts computed.
        speeds_W: of every rank, relative; None: equal. A rank of speed 0 is left out if it has no rows.

    Returns:
        load_imbalance: max / mean of the experts' rows (1 / `load_balance`); load_cv: their standard deviation / mean;
        rank_imbalance: the makespan max(rows / speed) over the bound sum(rows) / sum(speeds); unused_experts: without a row.
    """
    load_E = load_WE.sum(0).double()
    total = load_E.sum().item()
    if not total:
        return {}
    speeds = list(speeds_W) if speeds_W else [1.0] * len(rows_W)
    slowest = max(rows / speed if speed else float("inf") for rows, speed in zip(rows_W, speeds) if rows)
    return {"load_imbalance": 1 / load_balance(load_E),
            "load_cv": (load_E.std(correction=0) / load_E.mean()).item(),
            "rank_imbalance": slowest * sum(speeds) / sum(rows_W), "unused_experts": float((load_E == 0).sum())}


def load_metrics(loads: Mapping[int, torch.Tensor], rows: Mapping[int, Sequence[float]],
                 speeds_W: Sequence[float] | None = None, shown: Sequence[int] = ()) -> dict[str, float]:
    """Metrics of all layers together, and of each of the layers `shown`.

    Args:
        loads, rows: `load_WE` and `rows_W` of `layer_balance`, by layer.
    """
    found = {i: balance for i, load_WE in loads.items() if (balance := layer_balance(load_WE, rows[i], speeds_W))}
    if not found:
        return {}
    values = {f"moe/{name}": sum(of[name] for of in found.values()) / len(found)
              for name in ("load_imbalance", "load_cv", "rank_imbalance")}
    values["moe/unused_experts"] = sum(of["unused_experts"] for of in found.values()) \
        + sum(loads[i].shape[1] for i in loads.keys() - found.keys())
    return values | {f"moe/layer.{i}/{name}": found[i][name] for i in shown if i in found
                     for name in ("load_imbalance", "load_cv", "rank_imbalance")}


def spread_evenly(items: Sequence[int], most: int) -> list[int]:
    """At most `most` of them, the first and the last among them.

    >>> spread_evenly([0, 1, 2, 3, 4, 5, 6, 7], 3)
    [0, 4, 7]
    """
    if len(items) <= most:
        return list(items)
    if most < 2:
        return list(items[:most])
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


class LoadHistory:
    """Rows of every expert since the last metrics, and when each had its last one.

    Args:
        dead_after: an expert without a row for so many steps is called dead.
    """

    def __init__(self, dead_after: int):
        self.dead_after = dead_after
        self.sums: dict[int, torch.Tensor] = {}  # [E] by layer, since `restart`
        self._idle: dict[int, torch.Tensor] = {}  # [E] steps since an expert had a row

    def add(self, loads: Mapping[int, torch.Tensor]) -> None:
        """Take in one step: rows every rank sent to every expert, [W, E] by layer."""
        for i, load_WE in loads.items():
            load_E = load_WE.sum(0)
            self.sums[i] = self.sums[i] + load_E if i in self.sums else load_E
            idle = self._idle.get(i)
            self._idle[i] = torch.where(load_E > 0, 0, 1 if idle is None else idle + 1)

    def dead(self) -> dict[int, list[int]]:
        """Dead experts by layer; layers without any are left out."""
        found = {i: (idle >= self.dead_after).nonzero().flatten().tolist() for i, idle in self._idle.items()}
        return {i: experts for i, experts in found.items() if experts}

    def metrics(self, shown: Sequence[int] = ()) -> dict[str, float]:
        """`moe/dead_experts`, of all layers and of those `shown`; nothing in a model without experts."""
        if not self._idle:
            return {}
        dead = self.dead()
        return {"moe/dead_experts": float(sum(map(len, dead.values()))),
                **{f"moe/layer.{i}/dead_experts": float(len(dead.get(i, ()))) for i in shown}}

    def restart(self) -> None:
        self.sums.clear()


def chosen_pairs(routed: Assignment, experts: int, top_k: int) -> torch.Tensor:
    """The (token, expert) pairs of a routing, each one number, ascending, without repetition.

    Soft MoE sends every token everywhere a little: there the K experts count that a token reads most from.
    """
    if routed.mix_out is None or not len(routed.mix_out):  # a rank may have no sequences
        return (routed.token_ids_N.long() * experts + routed.expert_ids_N.long()).unique().cpu()
    g, s, m = routed.mix_out.shape
    of_expert_MC = torch.nn.functional.one_hot(routed.expert_ids_N[:m].long(), experts).to(routed.mix_out.dtype)
    chosen_TK = (routed.mix_out @ of_expert_MC).flatten(0, 1).topk(top_k, dim=-1).indices
    return (torch.arange(g * s, device=chosen_TK.device).unsqueeze(1) * experts + chosen_TK).flatten().unique().cpu()


def shared_pairs(before: torch.Tensor, now: torch.Tensor) -> int:
    """How many of the pairs before (see `chosen_pairs`) are there now."""
    return int(torch.isin(before, now).sum())


class RoutingMemory:
    """Which experts a sample of validation tokens went to, to be compared with the next evaluation's."""

    def __init__(self) -> None:
        self._before: dict[int, torch.Tensor] = {}
        self._now: dict[int, torch.Tensor] = {}

    def note(self, layer: int, routed: Assignment, experts: int, top_k: int) -> None:
        """The routing of the sample in one layer; the first call of an evaluation counts, so that it is the same sample."""
        if layer not in self._now:
            self._now[layer] = chosen_pairs(routed, experts, top_k)

    def compare(self) -> tuple[int, int]:
        """(pairs of the evaluation before that are still there, all pairs of it), over layers; then forgets that one."""
        kept = sum(shared_pairs(before, self._now[i]) for i, before in self._before.items() if i in self._now)
        total = sum(len(before) for i, before in self._before.items() if i in self._now)
        self._before, self._now = self._now, {}
        return kept, total
