"""From speeds and loads to a plan: the problem of every layer, the batch, and whether a change pays. Rank 0 does this."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Mapping, Sequence

from moedist.config import PlacementConfig
from moedist.coordinator.facts import RankFacts
from moedist.coordinator.sizes import Sizes
from moedist.coordinator.speeds import Speeds
from moedist.errors import PlacementError
from moedist.placement import (LayerPlan, Plan, Problem, Replan, bound, furthest, makespan, moved_placements, plan_batch,
                               plan_layer, rank_loads, replan_layer, split_batch, target_shares)

MEMORY_PART = 0.8  # of what is free: the rest is for buffers and what the allocator wastes


@dataclass(frozen=True)
class Cluster:
    """The ranks as the planner sees them: speeds now, and what does not change.

    Attributes:
        apart: every island has all experts and keeps its tokens.
        aims: routers balance by speed: plans have targets for them.
        fixed: experts and batch stay where they were written down; only targets follow the speeds.
    """

    facts: tuple[RankFacts, ...]
    expert: Speeds
    dense: Speeds
    apart: bool = False
    aims: bool = False
    fixed: bool = False


@dataclass(frozen=True)
class Proposal:
    """A plan, and what is expected of it.

    Attributes:
        reason: what has changed, for people; empty where the old plan stays.
        expert_s: predicted expert phase of a step, summed over layers; old_expert_s: with the plan in force.
        bound_s: no placement is faster than this.
        moved: placements that were not there before, over all layers.
    """

    plan: Plan
    reason: str
    expert_s: float
    old_expert_s: float
    bound_s: float
    moved: int

    @property
    def stays(self) -> bool:
        return not self.reason


def slots_of(facts: Sequence[RankFacts], sizes: Sizes, config: PlacementConfig) -> tuple[int, ...]:
    """Most experts of a layer on every rank: as configured, or by memory."""
    return tuple(config.max_experts) if config.max_experts is not None else \
        tuple(sizes.expert_slots(MEMORY_PART * f.free_bytes) for f in facts)


def problems(cluster: Cluster, loads: Mapping[int, Sequence[float]], sizes: Sizes, config: PlacementConfig,
             counts: Sequence[int]) -> dict[int, Problem]:
    """The problem of every MoE layer.

    Args:
        loads: expert rows a step, [E], by layer.
        counts: sequences of every rank; of no use where tokens do not stay in their island.
    """
    facts = cluster.facts
    links = [f.alltoall_bytes_per_s for f in facts if f.alltoall_bytes_per_s > 0]
    slots = slots_of(facts, sizes, config)
    if sum(slots) < sizes.experts:
        raise PlacementError(f"{sizes.experts} experts a layer do not fit: by memory the ranks can hold {list(slots)} "
                             f"({', '.join(f'{f.free_bytes / 2**30:.1f}' for f in facts)} GiB free, an expert takes "
                             f"{4 * sizes.expert_bytes / 2**20:.1f} MiB with its optimizer in each of {len(sizes.moe_layers)} "
                             "layers); add ranks or make experts smaller")
    islands = tuple(f.island for f in facts)
    island_rows = tuple(sum(n for n, i in zip(counts, islands) if i == island) / sum(counts)
                        for island in sorted(set(islands))) if cluster.apart else None
    work = {layer: sizes.work(layer, loads[layer]) for layer in sizes.moe_layers}
    return {layer: Problem(
        loads=tuple(float(f) for f in work[layer]),
        speeds=cluster.expert.effective(max(sum(work[layer]), 1), sizes.expert_calls),
        slots=slots, islands=islands, max_copies=config.max_copies,
        copy_cost_s=2 * sizes.expert_bytes / min(links) if links else 0.0, hot_copies=config.hot_copies,
        island_rows=island_rows)
        for layer in sizes.moe_layers}


def batch_counts(cluster: Cluster, layers: Sequence[LayerPlan], sizes: Sizes, config: PlacementConfig) -> list[int]:
    """Sequences of one forward pass per rank, by dense speed and memory; of islands that keep their tokens, also by how fast
    their experts are."""
    speeds = cluster.dense.effective(sizes.tokens, sizes.calls)
    if cluster.apart:
        speeds = _with_experts(cluster, speeds, sizes)
    caps = config.max_batch
    if caps is None:
        held = [0] * len(cluster.facts)
        for rank in (r for layer in layers for owners in layer.owners for r in owners):
            held[rank] += 1
        caps = [sizes.sequence_slots(MEMORY_PART * f.free_bytes, n) for f, n in zip(cluster.facts, held)]
    return plan_batch(sizes.part, speeds, caps)


def _with_experts(cluster: Cluster, dense_W: Sequence[float], sizes: Sizes) -> list[float]:
    """Tokens per second of every rank, its experts' part included: those of an island are as busy with its tokens as it can
    be made."""
    expert_W = cluster.expert.effective(max(sizes.rows, 1), sizes.expert_calls)
    per_token = len(sizes.moe_layers) * sizes.rows / sizes.tokens * sizes.mean_cost
    of_island = {}
    for island in {f.island for f in cluster.facts}:
        dense, expert = (sum(s for s, f in zip(of, cluster.facts) if f.island == island) for of in (dense_W, expert_W))
        of_island[island] = 1 / (1 + dense * per_token / expert) if dense and expert else 0.0
    return [speed * of_island[f.island] for speed, f in zip(dense_W, cluster.facts)]


def first_plan(cluster: Cluster, loads: Mapping[int, Sequence[float]] | None, sizes: Sizes,
               config: PlacementConfig) -> Proposal:
    """A plan from nothing; without loads every expert is taken to get the same."""
    loads = loads or {layer: [sizes.rows / sizes.experts] * sizes.experts for layer in sizes.moe_layers}
    found = problems(cluster, loads, sizes, config, batch_counts(cluster, [], sizes, config) if cluster.apart else ())
    layers = {layer: plan_layer(problem) for layer, problem in found.items()}
    counts = batch_counts(cluster, list(layers.values()), sizes, config)
    return _proposal(found, _aimed(found, layers, cluster, sizes), counts, None, cluster, "planned from measured speeds")


def written_again(plan: Plan, cluster: Cluster, sizes: Sizes, config: PlacementConfig) -> Proposal:
    """The plan that was written down, with the targets that these speeds make of it."""
    even = {layer: [sizes.rows / sizes.experts] * sizes.experts for layer in sizes.moe_layers}
    found = problems(cluster, even, sizes, config, split_batch(sizes.part, plan.batch_shares))
    layers = _aimed(found, dict(plan.layers), cluster, sizes)
    return _proposal(found, layers, plan.batch_shares, plan, cluster, "targets by speed")


def _aimed(found: Mapping[int, Problem], layers: Mapping[int, LayerPlan], cluster: Cluster,
           sizes: Sizes) -> dict[int, LayerPlan]:
    """The layers with targets for their routers, where those balance by speed."""
    return {i: replace(layer, targets=target_shares(layer, found[i].speeds, sizes.costs.get(i)) if cluster.aims else ())
            for i, layer in layers.items()}


def next_plan(cluster: Cluster, loads: Mapping[int, Sequence[float]], sizes: Sizes, config: PlacementConfig, old: Plan,
              horizon: int) -> Proposal:
    """The plan to go on with: the old one, unless a change pays back within `horizon` steps."""
    facts = cluster.facts
    old_counts = split_batch(sizes.part, old.batch_shares)
    found = problems(cluster, loads, sizes, config, old_counts)
    links = [f.alltoall_bytes_per_s for f in facts if f.alltoall_bytes_per_s > 0]
    move_s = 3 * sizes.expert_bytes / min(links) if links else 0.0  # weights and two moments
    placed = {layer: replace(old.layer(layer), targets=()) for layer in found}
    replans: dict[int, Replan] = {} if cluster.fixed else {
        layer: replan_layer(problem, placed[layer], move_s, horizon, config.tolerance) for layer, problem in found.items()}
    before = sum(makespan(placed[layer], problem) for layer, problem in found.items())
    after = sum(r.makespan_s for r in replans.values())
    forced = any(r.forced for r in replans.values())
    if cluster.fixed or after > (1 - config.tolerance) * before and not forced:  # not worth it for all layers together
        layers = placed
    else:
        layers = {layer: r.layer for layer, r in replans.items()}
    counts = batch_counts(cluster, list(layers.values()), sizes, config)
    if cluster.fixed or _slowest(cluster, counts, sizes) > (1 - config.tolerance) * _slowest(cluster, old_counts, sizes):
        counts = old_counts
    reasons = []
    moves = any(layers[i] != placed[i] for i in layers)
    if moves:
        reasons.append(f"experts move: {_why_experts(cluster, old)}")
    aimed = _aimed(found, layers, cluster, sizes)
    if not moves and all(furthest(old.layer(i).targets, layer.targets) <= config.tolerance for i, layer in aimed.items()):
        aimed = {i: old.layer(i) for i in layers}  # routers follow their targets slowly: those change with a reason alone
    elif not moves:
        reasons.append(f"routers aim at other loads: {_why_experts(cluster, old)}")
    if counts != old_counts:
        reasons.append(f"batch moves: {_why_batch(cluster, old_counts, counts, sizes)}")
    return _proposal(found, aimed, counts, old, cluster, "; ".join(reasons))


def _slowest(cluster: Cluster, counts: Sequence[int], sizes: Sizes) -> float:
    """Predicted dense time of a step; with that of experts, where an island's experts have its tokens alone."""
    if cluster.apart:
        speeds = _with_experts(cluster, cluster.dense.effective(sizes.tokens, sizes.calls), sizes)
        return max(n * sizes.calls * sizes.sequence / speed if speed else math.inf for n, speed in zip(counts, speeds) if n)
    return max(_dense_s(cluster, counts, sizes))


def _dense_s(cluster: Cluster, counts: Sequence[int], sizes: Sizes) -> list[float]:
    """Predicted dense time of a step on every rank."""
    return cluster.dense.seconds_of_all([n * sizes.calls * sizes.sequence for n in counts], sizes.calls).tolist()


def _why_experts(cluster: Cluster, old: Plan) -> str:
    """Ranks whose speed is no longer what the old plan was made for, the most changed first; else the loads are the reason."""
    changed = [(now / then, fact, now, then) for fact, now, then in zip(cluster.facts, cluster.expert.per_s, old.speeds)
               if then and now and not 0.8 < now / then < 1.25]
    changed.sort(key=lambda change: -abs(math.log(change[0])))
    return ", ".join(f"{_name(fact)} does {now:,.0f} expert rows/s, {ratio:.2f} times the {then:,.0f} the last plan was made for"
                     for ratio, fact, now, then in changed) or "the experts' loads have changed"


def _why_batch(cluster: Cluster, old: Sequence[int], new: Sequence[int], sizes: Sizes) -> str:
    """The rank that the others waited for."""
    seconds = _dense_s(cluster, old, sizes)
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    return (f"{_name(cluster.facts[slowest])} took longest outside experts, {1e3 * seconds[slowest]:.0f} ms with "
            f"{old[slowest]} sequences, and now has {new[slowest]}")


def _name(fact: RankFacts) -> str:
    return f"rank {fact.rank} ({fact.host}, {fact.device})"


def _proposal(found: Mapping[int, Problem], layers: Mapping[int, LayerPlan], counts: Sequence[float], old: Plan | None,
              cluster: Cluster, reason: str) -> Proposal:
    ranks = len(cluster.facts)
    seconds = [0.0] * ranks
    for layer, problem in found.items():
        for r, load in enumerate(rank_loads(layers[layer], problem.loads, ranks)):
            seconds[r] += load / problem.speeds[r] if load else 0.0
    plan = Plan(ranks, tuple(layers.items()), tuple(float(n) for n in counts), cluster.expert.per_s,
                tuple(1e3 * s for s in seconds))
    expert_s = sum(makespan(layers[i], problem) for i, problem in found.items())
    old_s = sum(makespan(old.layer(i), problem) for i, problem in found.items()) if old else expert_s
    return Proposal(plan, reason, expert_s, old_s, sum(bound(problem) for problem in found.values()),
                    moved_placements(old, plan) if old else 0)
