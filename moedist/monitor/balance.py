"""How evenly experts and ranks are loaded, and how routing changes: from load matrices and lists of routed pairs.

W ranks, E experts. Every rank knows all loads, so nothing here is gathered.
"""

from __future__ import annotations

from typing import Mapping, Sequence

import torch

from moedist.routing import Assignment


def layer_balance(load_WE: torch.Tensor, rows_W: Sequence[float], speeds_W: Sequence[float] | None = None) -> dict[str, float]:
    """Imbalance of one layer; empty where it had no rows.

    Args:
        load_WE: rows every rank sent to every expert.
        rows_W: rows every rank's experts computed.
        speeds_W: of every rank, relative; None: equal. A rank of speed 0 is left out if it has no rows.

    Returns:
        load_imbalance: max / mean of the experts' rows (as OLMo-core); load_cv: their standard deviation / mean;
        rank_imbalance: the makespan max(rows / speed) over the bound sum(rows) / sum(speeds); unused_experts: without a row.
    """
    load_E = load_WE.sum(0).double()
    total = load_E.sum().item()
    if not total:
        return {}
    speeds = list(speeds_W) if speeds_W else [1.0] * len(rows_W)
    slowest = max(rows / speed if speed else float("inf") for rows, speed in zip(rows_W, speeds) if rows)
    return {"load_imbalance": (load_E.max() / load_E.mean()).item(),
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


class RoutingMemory:
    """Which experts a sample of validation tokens went to, to be compared with the next evaluation's."""

    def __init__(self) -> None:
        self._before: dict[int, torch.Tensor] = {}
        self._now: dict[int, torch.Tensor] = {}

    def note(self, layer: int, routed: Assignment, experts: int) -> None:
        """The routing of the sample in one layer; the first call of an evaluation counts, so that it is the same sample."""
        if layer not in self._now:
            self._now[layer] = (routed.token_ids_N.long() * experts + routed.expert_ids_N.long()).cpu()

    def compare(self) -> tuple[int, int]:
        """(pairs of the evaluation before that are still there, all pairs of it), over layers; then forgets that one."""
        kept = sum(int(torch.isin(before, self._now[i]).sum()) for i, before in self._before.items() if i in self._now)
        total = sum(len(before) for i, before in self._before.items() if i in self._now)
        self._before, self._now = self._now, {}
        return kept, total
