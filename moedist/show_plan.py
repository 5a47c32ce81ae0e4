"""`moedist plan`: a plan and why, for this machine or for a cluster that is not here, without training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import numpy as np

from moedist.checkpoint import RunFolder, read_meta
from moedist.config import Config, check_config, load_config
from moedist.coordinator import Sizes
from moedist.coordinator.cluster_file import Kind, alike, facts_of, kinds_of, read_cluster, with_one_more_node
from moedist.coordinator.facts import RankFacts
from moedist.coordinator.meeting_points import experts_in_every_island, meeting
from moedist.coordinator.planning import Cluster, first_plan, slots_of
from moedist.coordinator.probe import probe
from moedist.coordinator.probe_table import MOST_LINES, number_range, ranks_text
from moedist.coordinator.simulate import StepTime, bound_s, equal_plan_of, predict
from moedist.coordinator.sizes import likely_vocab
from moedist.coordinator.speeds import Speeds
from moedist.dispatch import build_transport
from moedist.errors import CheckpointError, ConfigError
from moedist.placement import Plan, rank_loads, split_batch
from moedist.text_table import table
from moedist.world import World

FAR = 1.1  # times the bound, from which on copies are worth a hint
Loads = dict[int, list[float]]


@dataclass(frozen=True)
class Answer:
    """A plan for a cluster, with the step time predicted for it."""

    cluster: Cluster
    plan: Plan
    planned: StepTime
    loads: Loads
    sizes: Sizes
    why_apart: str  # why islands meet when they do; empty where there is one


def show_plan(config_path: str, overrides: Sequence[str], cluster_path: str | None, zipf: float, run: str | None,
              json_path: str | None) -> None:
    """Print a plan (rank 0), and write it as JSON.

    Args:
        cluster_path: a cluster file; None: the ranks of this world are measured.
        zipf: expert i gets a share proportional to (i + 1)^-zipf of a layer's rows.
        run: a run folder whose newest checkpoint says how the loads are; None: `zipf` says it.
    """
    refuse_missing_folder(json_path)
    config = load_config(config_path, overrides)
    vocab = likely_vocab(config)
    sizes = Sizes.of(config, vocab)
    loads = _loads_of_run(run, sizes) if run else zipf_loads(sizes, zipf)
    source = f"loads of {run}" if run else f"Zipf {zipf:g} loads"
    if cluster_path:
        kinds = read_cluster(cluster_path)
        text, figures = _report(config, sizes, facts_of(kinds), kinds, loads, f"{cluster_path}, {source}")
    else:
        with World.start(config.world) as world:
            check_config(config, world.size)
            facts = tuple(probe(world, config, vocab, build_transport(world), world.say))
            if not world.is_main:
                return
        text, figures = _report(config, sizes, facts, kinds_of(facts), loads, f"this machine, {source}")
    print(text)
    if json_path:
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


def refuse_missing_folder(*paths: str | None) -> None:
    """Raise `ConfigError`, before anything is measured, where a file is to be written into a folder that is not there."""
    for path in paths:
        if path and not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"there is no folder {Path(path).parent} to write {path} to; make it first")


def zipf_loads(sizes: Sizes, exponent: float) -> Loads:
    """Rows of every expert, [E], by layer: proportional to rank^-exponent; 0: all alike."""
    weights = [(i + 1) ** -exponent for i in range(sizes.experts)]
    return {layer: [sizes.rows * w / sum(weights) for w in weights] for layer in sizes.moe_layers}


def _loads_of_run(run: str, sizes: Sizes) -> Loads:
    checkpoint = RunFolder(run).newest()
    loads = {int(i): load for i, load in read_meta(checkpoint).get("coordinator", {}).get("loads", {}).items()}
    if set(loads) != set(sizes.moe_layers):
        raise CheckpointError(f"{checkpoint} holds the loads of layers {sorted(loads)}, the configuration has experts in "
                              f"layers {list(sizes.moe_layers)}; give the run's own configuration")
    return loads


def answer(config: Config, sizes: Sizes, facts: tuple[RankFacts, ...], loads: Loads) -> Answer:
    """Plan for these ranks and predict."""
    expert = Speeds(tuple(f.expert_call_s for f in facts), tuple(f.expert_rows_per_s for f in facts))
    dense = Speeds(tuple(f.dense_call_s for f in facts), tuple(f.dense_tokens_per_s for f in facts))
    apart, why = experts_in_every_island(config.placement, facts, slots_of(facts, sizes, config.placement), sizes,
                                       config.dispatch.dedup)
    cluster = Cluster(facts, expert.snapped(), dense.snapped(), apart)
    plan = first_plan(cluster, loads, sizes, config.placement).plan
    return Answer(cluster, plan, predict(cluster, plan, loads, sizes), loads, sizes, why)


def _report(config: Config, sizes: Sizes, facts: tuple[RankFacts, ...], kinds: list[Kind], loads: Loads,
            title: str) -> tuple[str, dict]:
    found = answer(config, sizes, facts, loads)
    planned, equal = found.planned, predict(found.cluster, equal_plan_of(len(facts), sizes), loads, sizes)
    dense, expert = bound_s(found.cluster, loads, sizes)
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
    if found.why_apart:
        lines.append(f"islands meet {meeting(found.cluster.apart)}: {found.why_apart}")
    enough = len(facts) - 1  # copies that reach the bound where memory allows (McNaughton 1959)
    if planned.expert_s > FAR * expert and config.placement.max_copies < enough:
        lines.append(f"experts take {planned.expert_s / expert:.2f} times their bound, and each is on one rank alone unless "
                     f"copies are allowed: try placement.max_copies={enough} (now {config.placement.max_copies})")
    sequences, held = split_batch(sizes.part, found.plan.batch_shares), _held(found).sum(0)
    idle = sum(not n and not experts for n, experts in zip(sequences, held))
    if idle:
        lines.append(f"{idle} of {len(facts)} ranks have nothing to do: {sizes.experts} experts and {sizes.part} sequences at a "
                     "time are too little for all; raise train.batch or model.experts, or allow copies (placement.max_copies)")
    more = {}
    for kind in kinds:
        bigger = answer(config, sizes, with_one_more_node(facts, kind), loads).planned
        more[kind.name] = bigger.total_s
        lines.append(f"one more node of {kind.name} ({kind.ranks_per_node} rank{'s' * (kind.ranks_per_node > 1)}): "
                     f"{1e3 * bigger.total_s:.2f} ms a step, {planned.total_s / bigger.total_s:.3f}x as fast")
    figures = {"plan": json.loads(found.plan.to_json()), "step_ms": 1e3 * planned.total_s,
               "equal_step_ms": 1e3 * equal.total_s, "bound_ms": 1e3 * bound,
               "one_more_node_step_ms": {name: 1e3 * s for name, s in more.items()}}
    return "\n".join(lines), figures


def _held(found: Answer, copied_only: bool = False) -> np.ndarray:
    """[layers, W]: experts on every rank, or only those of them that have copies."""
    held = np.zeros((len(found.plan.layers), len(found.cluster.facts)), dtype=int)
    for i, (_, layer) in enumerate(found.plan.layers):
        for owners in map(list, layer.owners):
            held[i, owners] += not copied_only or len(owners) > 1
    return held


def _ranks_table(found: Answer) -> str:
    facts, plan, planned = found.cluster.facts, found.plan, found.planned
    counts = split_batch(found.sizes.part, plan.batch_shares)
    held, copied = _held(found), _held(found, copied_only=True)
    rows_W = sum((rank_loads(layer, found.loads[i], len(facts)) for i, layer in plan.layers), np.zeros(len(facts)))
    longest = max(planned.rank_expert_s)
    groups = [[f.rank] for f in facts] if len(facts) <= MOST_LINES else alike(facts)
    rows = []
    for ranks in groups:
        f = facts[ranks[0]]
        rows.append([ranks_text(ranks), f.device_name or f.device, number_range([facts[r].expert_rows_per_s for r in ranks]),
                     number_range([facts[r].dense_tokens_per_s for r in ranks]),
                     number_range(held[:, ranks].flatten()), number_range(copied[:, ranks].flatten()),
                     f"{100 * rows_W[ranks].sum() / (rows_W.sum() or 1):.1f} %",
                     number_range([1e3 * planned.rank_expert_s[r] for r in ranks], 2),
                     number_range([1e3 * (longest - planned.rank_expert_s[r]) for r in ranks], 2),
                     number_range([counts[r] for r in ranks]),
                     number_range([1e3 * planned.rank_dense_s[r] for r in ranks], 2)])
    return table(["ranks", "device", "expert rows/s", "dense tokens/s", "experts a layer", "with copies", "load", "expert ms",
                  "wait ms", "sequences", "dense ms"], rows)
