"""The coordinator over time: loads and speeds observed, plans thought out beside the training, failures survived."""

import dataclasses
import threading
import time

import pytest
import torch

from moedist.config import config_from_dict
from moedist.coordinator import coordinator as module
from moedist.coordinator.coordinator import LOAD_DECAY, Coordinator
from moedist.coordinator.planning import first_plan
from moedist.coordinator.sizes import Sizes
from moedist.coordinator.speeds import RankTimes
from moedist.coordinator.start import equal_plan
from moedist.placement import split_batch
from moedist.world import World
from tests.coordinator.ranks_of import facts_of
from tests.ranks import run_ranks

TREE = {"data": {"sequence_length": 16}, "train": {"batch": 16}, "placement": {"replan_every": 10},
        "model": {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "experts": 8, "top_k": 2, "expert_hidden": 8}}
LOADS = {i: torch.full((2, 8), 32) for i in (0, 1)}  # rows that each of two ranks sends to every expert
EVEN = {i: [64.0] * 8 for i in (0, 1)}


def coordinator_of(world: World, overrides=(), facts=None, state=None) -> Coordinator:
    config = config_from_dict(TREE, overrides)
    return Coordinator(world, config, Sizes.of(config, 50), facts or facts_of([1000.0, 1000.0]), state)


def times(plan, speeds) -> RankTimes:
    """What ranks of these speeds report of a step under `plan` with even loads, in which each has half of the batch."""
    rows = {i: [64 * len(layer.experts_of_rank(r)) for r in range(2)] for i, layer in plan.layers}
    return RankTimes(rows, [128, 128], [sum(n[r] for n in rows.values()) / speeds[r] for r in range(2)],
                     [128 / s for s in speeds])


def test_loads_are_a_mean_that_follows_and_survive_a_restart():
    coordinator = coordinator_of(World())
    first, then = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64)
    first[0, 0], first[1, 0], then[1, 3] = 60, 40, 10
    coordinator.observe({1: first}, RankTimes({}, [0, 0], [0.0, 0.0], [0.0, 0.0]))
    coordinator.observe({1: then}, RankTimes({}, [0, 0], [0.0, 0.0], [0.0, 0.0]))
    expected = {1: [100 * LOAD_DECAY, 0, 0, round(10 * (1 - LOAD_DECAY), 3), 0, 0, 0, 0]}
    assert coordinator.state() == {"loads": expected}
    assert coordinator_of(World(), state={"loads": {"1": expected[1]}}).state() == {"loads": expected}


def replanned(world, case):
    """(first plan, plan after rank 1 was seen to be four times slower, what was said), and whether rank 0 was ready."""
    coordinator = coordinator_of(world)
    plan, _ = coordinator.first_plan(None)
    for _ in range(12):
        coordinator.observe(LOADS, times(plan, [1000.0, 1000.0 if case == "nothing new" else 250.0]))
    if case == "planner fails":
        coordinator.config = dataclasses.replace(coordinator.config, max_experts=[3, 3])
    if case == "rank 1 objects" and world.rank == 1:
        coordinator.facts = [dataclasses.replace(f, free_bytes=1000) for f in coordinator.facts]
    coordinator.start_replan(plan)
    while not any(world.gather_objects(coordinator.ready)):
        time.sleep(0.01)
    found, lines = coordinator.finish_replan(plan)
    assert not coordinator.ready
    return plan, found, lines


def held(plan) -> list[int]:
    return [len(plan.layer(0).experts_of_rank(r)) for r in range(plan.world_size)]


def test_a_rank_that_became_slower_loses_load_and_is_named():
    (plan, found, lines), (_, there, silent) = run_ranks(2, replanned, "slower")
    assert held(plan) == [4, 4] and held(found) == [7, 1] and found.sha256 == there.sha256
    assert split_batch(16, found.batch_shares) == [13, 3] and found.speeds == pytest.approx((1000, 250))
    assert len(lines) == 1 and silent == []
    for words in ("re-plan: experts move: rank 1 (here, cpu) does 250 expert rows/s, 0.25 times the 1,000", "batch moves: rank 1",
                  "6 placements change", "expert phase 2048.0 -> 896.0 ms predicted (bound 819.2)"):
        assert words in lines[0], lines


def test_nothing_is_said_or_done_where_nothing_changed():
    for plan, found, lines in run_ranks(2, replanned, "nothing new"):
        assert found is plan or found.sha256 == plan.sha256
        assert lines == []


@pytest.mark.parametrize("case, words", [
    ("planner fails", ["rank 0 could not plan", "8 experts", "do not fit"]),
    ("rank 1 objects", ["rank 1:", "GiB with the dense part", "placement.max_experts"]),
])
def test_whatever_fails_the_old_plan_stays_and_a_warning_says_why(case, words):
    for plan, found, lines in run_ranks(2, replanned, case):
        assert found.sha256 == plan.sha256 and len(lines) == 1
        assert lines[0].startswith("warning: the plan stays as it was: ")
        for word in words:
            assert word in lines[0]


@pytest.fixture
def waiting(monkeypatch):
    """A coordinator whose planner waits for the event before it begins, the plan in force, and the event."""
    coordinator, go, real = coordinator_of(World()), threading.Event(), module.next_plan
    plan = first_plan(coordinator._cluster(), EVEN, coordinator.sizes, coordinator.config).plan
    coordinator.observe(LOADS, times(plan, [1000.0, 1000.0]))

    def slowly(*args):
        assert go.wait(60)
        return real(*args)

    monkeypatch.setattr(module, "next_plan", slowly)
    yield coordinator, plan, go
    go.set()


def test_ready_only_once_the_planner_is_done(waiting):
    coordinator, plan, go = waiting
    assert not coordinator.ready  # nothing was asked
    coordinator.start_replan(plan)
    thread = coordinator._thread
    assert not coordinator.ready
    coordinator.start_replan(plan)  # one at a time
    assert coordinator._thread is thread
    go.set()
    thread.join(60)
    assert coordinator.ready


def test_what_a_dropped_planner_comes_to_is_forgotten(waiting):
    coordinator, plan, go = waiting
    coordinator.start_replan(plan)
    thread = coordinator._thread
    coordinator.experts_changed(coordinator.sizes, facts_of([1000.0, 500.0]))
    go.set()
    thread.join(60)
    assert not thread.is_alive() and not coordinator.ready and coordinator._found is None


def test_a_written_placement_is_never_replanned():
    config = config_from_dict(TREE)
    coordinator = Coordinator(World(), config, Sizes.of(config, 50))
    coordinator.start_replan(equal_plan(config, 2))
    assert not coordinator.ready and coordinator.facts is None
