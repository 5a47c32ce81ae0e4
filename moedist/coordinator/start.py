"""The plan that a run starts with: written down, measured, or that of the checkpoint it goes on from."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Mapping

from moedist.config import Config, PlacementConfig
from moedist.coordinator.coordinator import Coordinator
from moedist.coordinator.facts import RankFacts
from moedist.coordinator.meeting_points import meeting
from moedist.coordinator.probe import probe
from moedist.coordinator.probe_table import describe
from moedist.coordinator.sizes import Sizes
from moedist.dispatch import Transport
from moedist.errors import PlacementError
from moedist.model import ExpertForm
from moedist.placement import Plan, plan_from_config
from moedist.world import World

Forms = Mapping[int, Mapping[int, ExpertForm]]  # layer -> expert -> form, of all experts


def written_plan(config: Config, world_size: int, meta: dict[str, Any] | None) -> tuple[Plan | None, str | None]:
    """The plan that the configuration writes down, None where the ranks are to be measured; and a notice for people.

    A resumed run may come back on another number of ranks, for which the placement in the config makes no sense: the
    ranks are then measured like any others.
    """
    p = config.placement
    written = p.owners is not None or p.counts is not None or p.batch_shares is not None
    if not written and p.planner == "measured" and world_size > 1:
        return None, None
    try:
        return plan_from_config(config, world_size), None
    except PlacementError as error:
        if meta is None or meta["world_size"] == world_size:
            raise
        return equal_plan(config, world_size) if world_size == 1 else None, (
            f"resuming a run of {meta['world_size']} ranks on {world_size}: experts and batch are placed anew, because "
            f"{error}")


def start_plan(config: Config, world: World, transport: Transport, vocab: int, written: Plan | None,
               meta: dict[str, Any] | None, say: Callable[[str], None],
               forms: Forms | None = None) -> tuple[Plan, Coordinator]:
    """The plan to start with, measured where none is written, and the coordinator that goes on from it.

    Args:
        forms: of the experts of the checkpoint that is resumed.
    """
    sizes, state = sizes_of(config, vocab, forms), (meta or {}).get("coordinator")
    if written is not None:
        world.refuse_unequal("plan", written.sha256, "check that all ranks run the same moedist and configuration")
        if config.router.balance_to == "equal" or world.size == 1:
            return written, Coordinator(world, config, sizes, state=state)
    facts = measured_facts(config, world, transport, vocab, sizes, say)
    coordinator = Coordinator(world, config, sizes, facts, state, written)
    if coordinator.why_apart:
        say(f"islands meet {meeting(coordinator.apart)}: {coordinator.why_apart}")
    old = Plan.from_json(meta["plan"]) if meta and meta["world_size"] == world.size else None
    plan, why_not = coordinator.first_plan(old)
    if plan is None:
        what = "routers balance equally" if written else "experts and batch are placed equally" if old is None else \
            "the plan stays that of the checkpoint"
        say(f"warning: {what}, because the ranks could not agree on another: {why_not}")
        plan = written or old or equal_plan(config, world.size)
    return plan, coordinator


def plan_again(config: Config, world: World, transport: Transport, vocab: int, coordinator: Coordinator, plan: Plan,
               forms: Forms, say: Callable[[str], None]) -> Plan:
    """The plan to go on with, now that experts have other forms: measured anew, unless the plan was written down."""
    sizes = sizes_of(config, vocab, forms)
    if coordinator.facts is None:
        coordinator.experts_changed(sizes, None)
        return plan
    coordinator.experts_changed(sizes, measured_facts(config, world, transport, vocab, sizes, say))
    found, why_not = coordinator.first_plan(plan)
    if found is None:
        say(f"warning: the plan stays as it was: {why_not}")
    return found or plan


def measured_facts(config: Config, world: World, transport: Transport, vocab: int, sizes: Sizes,
                   say: Callable[[str], None]) -> list[RankFacts]:
    """What a probe finds, for experts as large as the mean one; rows are those of an uncompressed expert."""
    hidden = max(1, round(config.model.expert_hidden * sizes.mean_cost))
    model = dataclasses.replace(config.model, expert_hidden=hidden)
    facts = probe(world, dataclasses.replace(config, model=model), vocab, transport, say)
    say(describe(facts))
    cost = hidden / config.model.expert_hidden
    return [dataclasses.replace(fact, expert_rows_per_s=fact.expert_rows_per_s * cost) if fact.measured else fact
            for fact in facts]


def sizes_of(config: Config, vocab: int, forms: Forms | None) -> Sizes:
    """Sizes of a model whose experts may have been compressed."""
    sizes = Sizes.of(config, vocab)
    return sizes.compressed(forms, 8 if config.train.dtype == "float64" else 4) if forms else sizes


def equal_plan(config: Config, world_size: int) -> Plan:
    """As many experts and sequences on every rank as can be, whatever the configuration says of placement."""
    return plan_from_config(dataclasses.replace(config, placement=PlacementConfig()), world_size)
