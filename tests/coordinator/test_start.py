"""The plan that a run starts with: written, measured, resumed on as many ranks or on others."""

import pytest

from moedist.config import Config, config_from_dict
from moedist.coordinator.start import equal_plan, start_plan, written_plan
from moedist.dispatch import build_transport
from moedist.errors import PlacementError
from moedist.placement import split_batch
from tests.ranks import run_ranks

TREE = {"data": {"sequence_length": 16}, "train": {"batch": 12},
        "model": {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "experts": 8, "top_k": 2, "expert_hidden": 8}}


def config_of(overrides) -> Config:
    return config_from_dict(TREE, overrides)


def counts(plan) -> list[int]:
    return [len(plan.layer(0).experts_of_rank(r)) for r in range(plan.world_size)]


@pytest.mark.parametrize("overrides, ranks, expected", [
    (["placement.counts=[5,3]"], 2, [5, 3]),
    (["placement.owners={0: [0], 1: [1,2,3,4,5,6,7]}"], 2, [1, 7]),
    (["placement.batch_shares=[2,1]"], 2, [4, 4]),
    (["placement.planner=equal"], 3, [3, 3, 2]),
    ([], 1, [8]),
])
def test_what_is_written_down_is_not_measured(overrides, ranks, expected):
    plan, notice = written_plan(config_of(overrides), ranks, None)
    assert counts(plan) == expected and notice is None


def test_several_ranks_without_a_placement_are_measured():
    assert written_plan(config_of([]), 2, None) == (None, None)


def test_a_placement_for_other_ranks_is_refused_but_a_resumed_run_is_placed_anew():
    config = config_of(["placement.counts=[5,3]"])
    with pytest.raises(PlacementError, match="world has 3"):
        written_plan(config, 3, None)
    with pytest.raises(PlacementError):
        written_plan(config, 3, {"world_size": 3})
    plan, notice = written_plan(config, 3, {"world_size": 2})
    assert plan is None and "resuming a run of 2 ranks on 3: experts and batch are placed anew" in notice
    plan, notice = written_plan(config, 1, {"world_size": 2})
    assert counts(plan) == [8] and "placed anew" in notice


def started(world, overrides, meta):
    said = []
    config = config_of(overrides)
    written, _ = written_plan(config, world.size, meta)
    plan, coordinator = start_plan(config, world, build_transport(world), 50, written, meta, said.append)
    return plan, coordinator.state(), [f.expert_rows_per_s for f in coordinator.facts or ()], said


def everywhere(results):
    plans = {plan.sha256 for plan, *_ in results}
    assert len(plans) == 1
    return results[0]


def test_given_speeds_make_a_plan_without_measuring():
    given = ["placement.speeds=[3,1]", "placement.dense_speeds=[1,2]"]
    plan, state, speeds, said = everywhere(run_ranks(2, started, given, None))
    assert counts(plan) == [6, 2] and split_batch(12, plan.batch_shares) == [4, 8] and speeds == [3, 1]
    assert state == {"loads": {}} and "given" in said[0]


def test_a_written_plan_is_taken_and_nobody_is_measured():
    plan, _, speeds, said = everywhere(run_ranks(2, started, ["placement.counts=[7,1]"], None))
    assert counts(plan) == [7, 1] and speeds == [] and said == []


LOADS = {"loads": {"0": [100, 100, 10, 10, 10, 10, 10, 10], "1": [40] * 8}}


def test_resumed_on_as_many_ranks_the_plan_stays_unless_another_is_clearly_better():
    config = config_of(["placement.counts=[6,2]", "placement.batch_shares=[3,1]"])
    old = written_plan(config, 2, None)[0]
    meta = {"world_size": 2, "plan": old.to_json(), "coordinator": {"loads": {"0": [40] * 8, "1": [40] * 8}}}
    plan, state, _, _ = everywhere(run_ranks(2, started, ["placement.speeds=[3,1]"], meta))
    assert plan.layers == old.layers and split_batch(12, plan.batch_shares) == [9, 3]
    assert state == {"loads": {i: [40.0] * 8 for i in (0, 1)}}  # known from before
    plan, *_ = everywhere(run_ranks(2, started, ["placement.speeds=[1,1]"], meta))
    assert counts(plan) == [4, 4] and split_batch(12, plan.batch_shares) == [6, 6]


def test_resumed_on_other_ranks_the_loads_are_known_and_all_is_planned_from_them():
    meta = {"world_size": 3, "plan": equal_plan(config_of([]), 3).to_json(), "coordinator": LOADS}
    plan, *_ = everywhere(run_ranks(2, started, ["placement.speeds=[1,1]"], meta))
    hot = [plan.layer(0).owners[e] for e in (0, 1)]
    assert hot == [(0,), (1,)] or hot == [(1,), (0,)]


@pytest.mark.parametrize("old", [False, True])
def test_without_agreement_the_plan_is_the_old_or_an_equal_one_and_people_are_told(old):
    before = written_plan(config_of(["placement.counts=[7,1]"]), 2, None)[0]
    meta = {"world_size": 2, "plan": before.to_json()} if old else None
    plan, _, _, said = everywhere(run_ranks(2, started, ["placement.speeds=[1,1]", "placement.max_experts=[3,3]"], meta))
    assert counts(plan) == ([7, 1] if old else [4, 4])
    instead = "the plan stays that of the checkpoint" if old else "experts and batch are placed equally"
    assert said[-1].startswith(f"warning: {instead}")
    assert "8 experts a layer do not fit" in said[-1]


def test_a_written_plan_has_targets_where_routers_balance_by_speed():
    given = ["placement.counts=[4,4]", "router.balance_to=speed"]
    plan, _, speeds, said = everywhere(run_ranks(2, started, [*given, "placement.speeds=[3,1]"], None))
    assert counts(plan) == [4, 4] and speeds == [3, 1] == list(plan.speeds) and "given" in said[0]
    assert plan.layer(0).targets == plan.layer(1).targets == (0.1875,) * 4 + (0.0625,) * 4
    plan, _, speeds, _ = everywhere(run_ranks(2, started, [*given, "placement.probe_s=0.2"], None))
    assert counts(plan) == [4, 4] and min(speeds) > 0 and sum(plan.layer(0).targets) == pytest.approx(1)
    plan, _, _, said = everywhere(run_ranks(2, started, [*given, "placement.speeds=[1,0]"], None))
    assert counts(plan) == [4, 4] and not plan.layer(0).targets
    assert "warning: routers balance equally" in said[-1] and "rank 1 has experts [4, 5, 6, 7] but speed 0" in said[-1]
