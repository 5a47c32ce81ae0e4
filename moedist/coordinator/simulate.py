"""How long a step would take under a plan, from speeds, loads and links: a sum of phases, each as long as its slowest rank.

The parts are added as if nothing overlapped, which is what the layer does today. W ranks, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Sequence

import numpy as np

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
    dense_W = cluster.dense.seconds_of_all([n * sizes.calls * sizes.sequence for n in counts], sizes.calls)
    expert_total, exchange, expert_W = 0.0, 0.0, np.zeros(ranks)
    for layer, placed in plan.layers:
        rows_W = rank_loads(placed, loads[layer], ranks)
        seconds_W = cluster.expert.seconds_of_all(rows_W, sizes.expert_calls)
        expert_W += seconds_W
        expert_total += float(seconds_W.max())
        among = [np.array(placed.islands) == island for island in set(placed.islands)] or [np.ones(ranks, dtype=bool)]
        exchange += max(_exchange_s(cluster, rows_W * those, np.asarray(counts) * those, sizes) for those in among)
    sync = _sync_s(cluster, plan, sizes)
    return StepTime(float(dense_W.max()), expert_total, exchange, sync, tuple(expert_W.tolist()), tuple(dense_W.tolist()))


def _exchange_s(cluster: Cluster, rows_W: np.ndarray, counts_W: np.ndarray, sizes: Sizes) -> float:
    """Seconds of the row exchanges of a layer on the rank where they take longest: what it sends or what it gets, whichever
    is more. Ranks without rows and sequences take no part."""
    if not rows_W.sum() or not counts_W.sum():
        return 0.0
    bytes_per_s_W, latency_W = (np.array([getattr(f, name) for f in cluster.facts])
                                for name in ("alltoall_bytes_per_s", "alltoall_latency_s"))
    batch_W, load_W = counts_W / counts_W.sum(), rows_W / rows_W.sum()
    away_W = np.maximum(batch_W * (1 - load_W), load_W * (1 - batch_W)) * rows_W.sum()  # between this rank and others
    linked = bytes_per_s_W > 0
    seconds_W = sizes.expert_calls * latency_W + away_W * sizes.row_bytes / np.where(linked, bytes_per_s_W, 1.0)
    return EXCHANGES * float(seconds_W[linked].max(initial=0.0))


def _sync_s(cluster: Cluster, plan: Plan, sizes: Sizes) -> float:
    """Seconds that gradients take: a ring all-reduce moves every byte of the dense part twice; those of copies go to the
    expert's primary and its weights back, all at once, so that the rank with most of them takes longest."""
    bytes_per_s_W = np.array([f.alltoall_bytes_per_s for f in cluster.facts])
    linked = bytes_per_s_W > 0
    if len(linked) == 1 or not linked.any():
        return 0.0
    copies_W = np.zeros(len(linked))
    for primary, owners in (pair for _, layer in plan.layers for pair in zip(layer.primaries, layer.owners)):
        copies_W[list(owners)] += 1
        copies_W[primary] += len(owners) - 2
    of_copies = copies_W[linked] * sizes.expert_bytes / bytes_per_s_W[linked]
    return 2 * (sizes.dense_bytes / bytes_per_s_W[linked].min() + float(of_copies.max()))


def bound_s(cluster: Cluster, loads: Mapping[int, Sequence[float]], sizes: Sizes) -> tuple[float, float]:
    """(dense, expert) seconds of a step if work could be cut without limit: no plan is faster."""
    dense = cluster.dense.least_s(sizes.tokens, sizes.calls)
    return dense, sum(cluster.expert.least_s(sum(load), sizes.expert_calls) for load in loads.values())


def equal_plan_of(ranks: int, sizes: Sizes) -> Plan:
    """As many experts and sequences on every rank as can be: what trainers that know no other way do."""
    owners = [rank for rank, count in enumerate(equal_counts(sizes.experts, ranks)) for _ in range(count)]
    return Plan(ranks, tuple((i, LayerPlan.single(owners)) for i in sizes.moe_layers), (1.0,) * ranks)
