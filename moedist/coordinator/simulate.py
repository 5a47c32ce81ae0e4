"""How long a step would take under a plan, from speeds, loads and links: a sum of phases, each as long as its slowest rank.

The parts are added as if nothing overlapped, which is what the layer does today. W ranks, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Sequence

from moedist.coordinator.planning import Cluster
from moedist.coordinator.sizes import Sizes
from moedist.placement import LayerPlan, Plan, equal_counts, rank_loads, split_batch

EXCHANGES = 4  # of rows in a layer: there and back, forward and backward


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by phase, and those of each rank in its expert phases and outside them, [W]."""

    dense_s: float
    expert_s: float
    exchange_s: float
    sync_s: float
    rank_expert_s: tuple[float, ...]
    rank_dense_s: tuple[float, ...]

    @property
    def total_s(self) -> float:
        return self.dense_s + self.expert_s + self.exchange_s + self.sync_s


def predict(cluster: Cluster, plan: Plan, loads: Mapping[int, Sequence[float]], sizes: Sizes) -> StepTime:
    """The time of one step.

    Args:
        loads: expert rows of a step, [E], by layer.
    """
    ranks = len(cluster.facts)
    counts = split_batch(sizes.part, plan.batch_shares)
    dense = [cluster.dense.seconds(r, n * sizes.calls * sizes.sequence, sizes.calls) for r, n in enumerate(counts)]
    expert_total, exchange, per_rank = 0.0, 0.0, [0.0] * ranks
    for layer, placed in plan.layers:
        rows = rank_loads(placed, loads[layer], ranks)
        seconds = [cluster.expert.seconds(r, n, sizes.calls) for r, n in enumerate(rows)]
        per_rank = [a + b for a, b in zip(per_rank, seconds)]
        expert_total += max(seconds)
        exchange += max(_exchange_s(cluster, r, rows, counts, sizes) for r in range(ranks))
    copies = sum(placed.copies for _, placed in plan.layers)
    slowest = min((f.alltoall_bytes_per_s for f in cluster.facts if f.alltoall_bytes_per_s), default=0.0)
    # a ring all-reduce moves every byte twice; copies' gradients go to the primary and its weights back
    sync = 2 * (sizes.dense_bytes + copies * sizes.expert_bytes) / slowest if slowest and ranks > 1 else 0.0
    return StepTime(max(dense), expert_total, exchange, sync, tuple(per_rank), tuple(dense))


def _exchange_s(cluster: Cluster, rank: int, rows_W: Sequence[float], counts_W: Sequence[int], sizes: Sizes) -> float:
    """Seconds that the row exchanges of a layer take a rank: what it sends or what it gets, whichever is more."""
    fact, total = cluster.facts[rank], sum(rows_W)
    if not fact.alltoall_bytes_per_s or not total:
        return 0.0
    batch, load = counts_W[rank] / sum(counts_W), rows_W[rank] / total
    away = max(batch * (1 - load), load * (1 - batch)) * total  # rows between this rank and others
    return EXCHANGES * (sizes.calls * fact.alltoall_latency_s + away * sizes.row_bytes / fact.alltoall_bytes_per_s)


def bound_s(cluster: Cluster, sizes: Sizes) -> tuple[float, float]:
    """(dense, expert) seconds of a step if work could be cut without limit: no plan is faster."""
    dense = sizes.tokens / sum(cluster.dense.effective(sizes.tokens, sizes.calls))
    expert = sizes.rows / sum(cluster.expert.effective(sizes.rows, sizes.calls))
    return dense, expert * len(sizes.moe_layers)


def equal_plan_of(ranks: int, sizes: Sizes) -> Plan:
    """As many experts and sequences on every rank as can be: what trainers that know no other way do."""
    owners = [rank for rank, count in enumerate(equal_counts(sizes.experts, ranks)) for _ in range(count)]
    return Plan(ranks, tuple((i, LayerPlan.single(owners)) for i in sizes.moe_layers), (1.0,) * ranks)
