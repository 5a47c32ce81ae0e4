"""The plan that a run starts with: written down, measured, or that of the checkpoint it goes on from."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable

from moedist.config import Config, PlacementConfig
from moedist.coordinator.coordinator import Coordinator
from moedist.coordinator.probe import describe, probe
from moedist.coordinator.sizes import Sizes
from moedist.dispatch import Transport
from moedist.errors import PlacementError
from moedist.placement import Plan, plan_from_config
from moedist.world import World


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
            f"resuming a run of {meta['world_size']} ranks on {world_size}: experts and batch are placed anew, because {error}")


def start_plan(config: Config, world: World, transport: Transport, vocab: int, written: Plan | None,
               meta: dict[str, Any] | None, say: Callable[[str], None]) -> tuple[Plan, Coordinator]:
    """The plan to start with, measured where none is written, and the coordinator that goes on from it."""
    sizes, state = Sizes.of(config, vocab), (meta or {}).get("coordinator")
    if written is not None:
        world.refuse_unequal("plan", written.sha256, "check that all ranks run the same moedist and configuration")
        return written, Coordinator(world, config, sizes)
    facts = probe(world, config, vocab, transport, say)
    say(describe(facts))
    coordinator = Coordinator(world, config, sizes, facts, state)
    old = Plan.from_json(meta["plan"]) if meta and meta["world_size"] == world.size else None
    plan, why_not = coordinator.first_plan(old)
    if plan is None:
        say(f"warning: experts and batch are placed equally, because the ranks could not agree on a plan: {why_not}")
        plan = old or equal_plan(config, world.size)
    return plan, coordinator


def equal_plan(config: Config, world_size: int) -> Plan:
    """As many experts and sequences on every rank as can be, whatever the configuration says of placement."""
    return plan_from_config(dataclasses.replace(config, placement=PlacementConfig()), world_size)
