"""`moedist plan`: a plan and why, for this machine or for a cluster that is not here, without training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Sequence

from moedist.checkpoint import RunFolder, read_meta
from moedist.config import Config, check_config, load_config
from moedist.coordinator import Sizes
from moedist.coordinator.cluster_file import Kind, facts_of, kinds_of, read_cluster, with_one_more_node
from moedist.coordinator.facts import RankFacts
from moedist.coordinator.planning import Cluster, first_plan
from moedist.coordinator.probe import probe
from moedist.coordinator.simulate import StepTime, bound_s, equal_plan_of, predict
from moedist.coordinator.speeds import Speeds
from moedist.dispatch import build_transport
from moedist.errors import CheckpointError
from moedist.monitor.table import table
from moedist.placement import Plan, split_batch
from moedist.world import World

MOST_LINES = 32  # beyond, ranks are shown kind by kind
Loads = dict[int, list[float]]


@dataclass(frozen=True)
class Answer:
    """A plan for a cluster, with the step times predicted for it and for equal placement."""

    cluster: Cluster
    plan: Plan
    planned: StepTime
    equal: StepTime
    sizes: Sizes


def show_plan(config_path: str, overrides: Sequence[str], cluster_path: str | None, zipf: float, run: str | None,
              json_path: str | None) -> None:
    """Print a plan (rank 0), and write it as JSON.

    Args:
        cluster_path: a cluster file; None: the ranks of this world are measured.
        zipf: expert i gets a share proportional to (i + 1)^-zipf of a layer's rows.
        run: a run folder whose newest checkpoint says how the loads are; None: `zipf` says it.
    """
    config = load_config(config_path, overrides)
    sizes = Sizes.of(config, config.data.vocab)
    loads = _loads_of_run(run, sizes) if run else zipf_loads(sizes, zipf)
    source = f"loads of {run}" if run else f"Zipf {zipf:g} loads"
    if cluster_path:
        kinds = read_cluster(cluster_path)
        text, figures = _report(config, sizes, facts_of(kinds), kinds, loads, f"{cluster_path}, {source}")
    else:
        with World.start(config.world) as world:
            check_config(config, world.size)
            facts = tuple(probe(world, config, config.data.vocab, build_transport(world)))
            if not world.is_main:
                return
        text, figures = _report(config, sizes, facts, kinds_of(facts), loads, f"this machine, {source}")
    print(text)
    if json_path:
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


def zipf_loads(sizes: Sizes, exponent: float) -> Loads:
    """Rows of every expert, [E], by layer: proportional to rank^-exponent; 0: all alike."""
    weights = [(i + 1) ** -exponent for i in range(sizes.experts)]
    return {layer: [sizes.rows * w / sum(weights) for w in weights] for layer in sizes.moe_layers}


def _loads_of_run(run: str, sizes: Sizes) -> Loads:
    checkpoint = RunFolder(run).newest()
    loads = {int(i): load for i, load in read_meta(checkpoint).get("coordinator", {}).get("loads", {}).items()}
    if set(loads) != set(sizes.moe_layers):
        raise CheckpointError(f"{checkpoint} holds the loads of layers {sorted(loads)}, the configuration has experts in layers "
                              f"{list(sizes.moe_layers)}; a run whose ranks were measured and whose model is this one has them")
    return loads


def answer(config: Config, sizes: Sizes, facts: tuple[RankFacts, ...], loads: Loads) -> Answer:
    """Plan for these ranks and predict."""
    cluster = Cluster(facts, Speeds(tuple(f.expert_call_s for f in facts), tuple(f.expert_rows_per_s for f in facts)).snapped(),
                      Speeds(tuple(f.dense_call_s for f in facts), tuple(f.dense_tokens_per_s for f in facts)).snapped())
    plan = first_plan(cluster, loads, sizes, config.placement).plan
    equal = predict(cluster, equal_plan_of(len(facts), sizes), loads, sizes)
    return Answer(cluster, plan, predict(cluster, plan, loads, sizes), equal, sizes)


def _report(config: Config, sizes: Sizes, facts: tuple[RankFacts, ...], kinds: list[Kind], loads: Loads,
            title: str) -> tuple[str, dict]:
    found = answer(config, sizes, facts, loads)
    planned, equal = found.planned, found.equal
    dense, expert = bound_s(found.cluster, sizes)
    bound = dense + expert + planned.exchange_s + planned.sync_s
    lines = [f"{len(facts)} ranks ({title}): {sizes.experts} experts in each of {len(sizes.moe_layers)} layers, batch "
             f"{sizes.part * sizes.calls}", "", _ranks_table(found), "",
             table(["predicted ms of a step", "this plan", "equal placement", "bound"],
                   [[name, f"{1e3 * a:.2f}", f"{1e3 * b:.2f}", c] for name, a, b, c in (
                       ("dense (slowest rank)", planned.dense_s, equal.dense_s, f"{1e3 * dense:.2f}"),
                       ("experts (slowest rank, all layers)", planned.expert_s, equal.expert_s, f"{1e3 * expert:.2f}"),
                       ("all-to-all", planned.exchange_s, equal.exchange_s, ""),
                       ("gradients", planned.sync_s, equal.sync_s, ""),
                       ("step", planned.total_s, equal.total_s, f"{1e3 * bound:.2f}"))]), "",
             f"{equal.total_s / planned.total_s:.2f}x as fast as equal placement, {planned.total_s / bound:.3f} of the bound"]
    more = {}
    for i, kind in enumerate(kinds):
        bigger = answer(config, sizes, facts_of(with_one_more_node(kinds, i)), loads).planned
        more[kind.name] = bigger.total_s
        lines.append(f"one more node of {kind.name} ({kind.ranks_per_node} ranks): {1e3 * bigger.total_s:.2f} ms a step, "
                     f"{planned.total_s / bigger.total_s:.3f}x as fast")
    figures = {"plan": json.loads(found.plan.to_json()), "step_ms": 1e3 * planned.total_s, "equal_step_ms": 1e3 * equal.total_s,
               "bound_ms": 1e3 * bound, "one_more_node_step_ms": {name: 1e3 * s for name, s in more.items()}}
    return "\n".join(lines), figures


def _ranks_table(found: Answer) -> str:
    facts, plan = found.cluster.facts, found.plan
    counts = split_batch(found.sizes.part, plan.batch_shares)
    held = [[len(layer.experts_of_rank(f.rank)) for _, layer in plan.layers] for f in facts]
    copied = [sum(len(layer.owners[e]) > 1 for _, layer in plan.layers for e in layer.experts_of_rank(f.rank)) for f in facts]
    total, longest = sum(plan.predicted_ms), max(found.planned.rank_expert_s)
    groups = [[f.rank] for f in facts] if len(facts) <= MOST_LINES else _by_kind(facts)
    rows = []
    for ranks in groups:
        f, spread = facts[ranks[0]], found.planned.rank_expert_s
        rows.append([_ranks(ranks), f.device_name or f.device, f"{f.expert_rows_per_s:,.0f}", f"{f.dense_tokens_per_s:,.0f}",
                     _range([n for r in ranks for n in held[r]]), _range([copied[r] for r in ranks]),
                     f"{100 * sum(plan.predicted_ms[r] * facts[r].expert_rows_per_s for r in ranks) / _work(plan, facts):.1f} %"
                     if total else "0 %", _range([1e3 * spread[r] for r in ranks], 2),
                     _range([1e3 * (longest - spread[r]) for r in ranks], 2), _range([counts[r] for r in ranks]),
                     _range([1e3 * found.planned.rank_dense_s[r] for r in ranks], 2)])
    return table(["ranks", "device", "expert rows/s", "dense tokens/s", "experts a layer", "with copies", "load", "expert ms",
                  "wait ms", "sequences", "dense ms"], rows)


def _work(plan: Plan, facts: Sequence[RankFacts]) -> float:
    return sum(ms * f.expert_rows_per_s for ms, f in zip(plan.predicted_ms, facts))


def _by_kind(facts: Sequence[RankFacts]) -> list[list[int]]:
    kinds: dict[tuple, list[int]] = {}
    for f in facts:
        kinds.setdefault((f.device_name, f.expert_rows_per_s, f.dense_tokens_per_s), []).append(f.rank)
    return list(kinds.values())


def _ranks(ranks: list[int]) -> str:
    if len(ranks) > 1 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ", ".join(map(str, ranks))


def _range(values: Sequence[float], digits: int = 0) -> str:
    low, high = (f"{v:,.{digits}f}" for v in (min(values), max(values)))
    return low if low == high else f"{low}-{high}"
