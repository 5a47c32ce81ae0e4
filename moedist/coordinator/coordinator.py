"""Plans at the start of a run, watches loads and speeds, and re-plans while training goes on.

Every rank has a coordinator and calls it at the same steps; rank 0's does the thinking, in a thread beside the training.
"""

from __future__ import annotations

import threading
from typing import Any, Mapping, Sequence

import torch

from moedist.config import Config
from moedist.coordinator.facts import RankFacts
from moedist.coordinator.meeting_points import experts_in_every_island
from moedist.coordinator.planning import Cluster, Proposal, first_plan, next_plan, slots_of, written_again
from moedist.coordinator.protocol import agree
from moedist.coordinator.sizes import STATES, Sizes
from moedist.coordinator.speeds import RankTimes, SpeedTracker
from moedist.errors import PlacementError
from moedist.placement import Plan
from moedist.world import World

LOAD_DECAY = 0.8  # of the mean load, each step: routers drift, and a plan is for the loads that come next


class Coordinator:
    """The plan of a run over time.

    Args:
        facts: measured facts of every rank; None where the placement was written down: then nothing is ever re-planned.
        fixed: that placement, where routers balance by speed: it stays, and their targets follow the measured speeds.
        state: what `state` returned when a checkpoint was written; {} at the start.
    """

    def __init__(self, world: World, config: Config, sizes: Sizes, facts: Sequence[RankFacts] | None = None,
                 state: Mapping[str, Any] | None = None, fixed: Plan | None = None):
        self.world, self.config, self.dedup = world, config.placement, config.dispatch.dedup
        self.sizes, self.facts, self.fixed, self._aims = sizes, facts, fixed, config.router.balance_to == "speed"
        self.apart, self.why_apart = self._choose_meeting_points()
        self._tracker = SpeedTracker(facts) if facts else None
        self._loads = {int(i): torch.tensor(load, dtype=torch.float64) for i, load in (state or {}).get("loads", {}).items()}
        self._thread: threading.Thread | None = None
        self._found: Proposal | Exception | None = None  # what the thread came to

    def experts_changed(self, sizes: Sizes, facts: Sequence[RankFacts] | None) -> None:
        """Experts have other sizes now, and the ranks were measured anew; a plan that is being thought out is dropped."""
        self.sizes, self._thread, self._found = sizes, None, None
        if facts is not None:
            self.facts, self._tracker = facts, SpeedTracker(facts)
            self.apart, self.why_apart = self._choose_meeting_points()

    def _choose_meeting_points(self) -> tuple[bool, str]:
        if self.facts is None or self.fixed is not None:
            return False, ""
        if self.world.size > 1 and self.world.groups is None:
            wanted = self.config.experts_in_every_island
            if wanted is True and len(set(self.world.islands)) > 1:
                raise PlacementError("placement.experts_in_every_island=true needs the island transport, and rows travel by "
                                     f"{self.world.transport}; set world.transport=islands")
            return False, ""
        slots = slots_of(self.facts, self.sizes, self.config)
        return experts_in_every_island(self.config, self.facts, slots, self.sizes, self.dedup)

    def state(self) -> dict[str, Any]:
        """What the next run needs to plan as well as this one would: the mean loads."""
        return {"loads": {i: [round(v, 3) for v in load.tolist()] for i, load in self._loads.items()}}

    def first_plan(self, old: Plan | None) -> tuple[Plan | None, str]:
        """A plan for the start of a run, or None and why there is none.

        Args:
            old: the plan of the checkpoint that is resumed on as many ranks; it stays unless another is clearly better.
        """
        def solve() -> Plan:
            if self.fixed is not None:
                return written_again(self.fixed, self._cluster(), self.sizes, self.config).plan
            if old is not None and len(self._loads) == len(self.sizes.moe_layers):
                return next_plan(self._cluster(), self._mean_loads(), self.sizes, self.config, old, self._horizon).plan
            return first_plan(self._cluster(), self._mean_loads(), self.sizes, self.config).plan

        return agree(self.world, solve, self._objection)

    def observe(self, loads: Mapping[int, torch.Tensor], times: RankTimes) -> None:
        """Take in one step: rows every rank sent to every expert, [W, E] by layer, and what every rank did."""
        if not self.world.is_main:
            return
        if self._tracker is not None:
            self._tracker.observe(times, self.sizes.calls, self.sizes.expert_calls)
        for layer, load_WE in loads.items():
            load_E = load_WE.sum(0).double()
            mean = self._loads.get(layer, load_E)
            self._loads[layer] = LOAD_DECAY * mean + (1 - LOAD_DECAY) * load_E

    def start_replan(self, plan: Plan) -> None:
        """Begin to look for a better plan, in the background."""
        if self._tracker is None or not self.world.is_main or self._thread is not None:
            return
        # now: the thread must not read what training writes
        cluster, loads, sizes = self._cluster(), self._mean_loads(), self.sizes

        def think() -> None:
            found: Proposal | Exception
            try:
                found = next_plan(cluster, loads, sizes, self.config, plan, self._horizon)
            except Exception as error:
                found = error
            if self._thread is threading.current_thread():  # else it was dropped meanwhile
                self._found = found

        self._thread = threading.Thread(target=think, name="moedist-planner", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether this rank asks all to take up a finished re-plan at the end of the step."""
        return self._thread is not None and not self._thread.is_alive()

    def finish_replan(self, plan: Plan) -> tuple[Plan, list[str]]:
        """Agree on the plan that rank 0 has found. Every rank must call it, at the end of the same step.

        Returns:
            (the plan from now on, what to tell people).
        """
        proposal: Proposal | None = None

        def solve() -> Plan:
            nonlocal proposal
            if isinstance(self._found, Exception):
                raise self._found
            proposal = self._found
            return plan if proposal.stays else proposal.plan

        found, why_not = agree(self.world, solve, self._objection)
        self._thread = self._found = None
        if found is None:
            return plan, [f"warning: the plan stays as it was: {why_not}"]
        if found.sha256 == plan.sha256 or proposal is None or proposal.stays:
            return found, []
        self._tracker.forget()
        return found, [f"re-plan: {proposal.reason}; {proposal.moved} placements change, expert phase "
                       f"{1e3 * proposal.old_expert_s:.1f} -> {1e3 * proposal.expert_s:.1f} ms predicted (bound "
                       f"{1e3 * proposal.bound_s:.1f})"]

    @property
    def _horizon(self) -> int:
        """Steps that a plan is for."""
        return self.config.replan_every or 1000

    def _cluster(self) -> Cluster:
        return Cluster(tuple(self.facts), *self._tracker.speeds(), self.apart, self._aims, self.fixed is not None)

    def _mean_loads(self) -> dict[int, list[float]]:
        return {i: load.tolist() for i, load in self._loads.items()}

    def _objection(self, plan: Plan) -> str | None:
        """What speaks against a plan from where this rank stands: experts that it cannot hold."""
        fact = self.facts[self.world.rank]
        held = sum(len(layer.experts_of_rank(self.world.rank)) for _, layer in plan.layers)
        need = STATES * (held * self.sizes.expert_bytes + self.sizes.dense_bytes)
        if need > fact.free_bytes:
            return (f"{held} experts need {need / 2**30:.2f} GiB with the dense part, and {fact.free_bytes / 2**30:.2f} GiB "
                    f"are free on {fact.device}; set placement.max_experts")
        return None
