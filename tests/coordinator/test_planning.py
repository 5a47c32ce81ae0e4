"""Plans from speeds and loads: who gets how much, what memory allows, and when a change is worth it."""

import dataclasses

import pytest

from moedist.config import PlacementConfig, config_from_dict
from moedist.coordinator.planning import Cluster, first_plan, next_plan, written_again
from moedist.coordinator.sizes import Sizes
from moedist.coordinator.speeds import Speeds
from moedist.errors import PlacementError
from moedist.placement import LayerPlan, Plan, rank_loads, split_batch
from tests.coordinator.ranks_of import facts_of

CONFIG = config_from_dict({"data": {"sequence_length": 16}, "train": {"batch": 16},
                           "model": {"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "experts": 8, "top_k": 2,
                                     "expert_hidden": 64}})
SIZES = Sizes.of(CONFIG, 300)
ROWS = 16 * 16 * 2  # of a layer in a step
EVEN = {i: [ROWS / 8] * 8 for i in (0, 1)}
PLACEMENT = PlacementConfig()


def cluster(speeds, dense=None, **facts) -> Cluster:
    dense = dense or speeds
    return Cluster(tuple(facts_of(speeds, dense, **facts)), Speeds((0.0,) * len(speeds), tuple(map(float, speeds))),
                   Speeds((0.0,) * len(dense), tuple(map(float, dense))))


def held(plan: Plan, layer: int = 0) -> list[int]:
    return [len(plan.layer(layer).experts_of_rank(r)) for r in range(plan.world_size)]


def test_experts_follow_expert_speed_and_sequences_dense_speed():
    found = first_plan(cluster([300, 100], [100, 300]), None, SIZES, PLACEMENT)
    assert held(found.plan, 0) == held(found.plan, 1) == [6, 2]
    assert split_batch(16, found.plan.batch_shares) == [4, 12]
    assert found.expert_s == found.bound_s == pytest.approx(2 * ROWS / 400) and found.plan.speeds == (300, 100)
    assert found.plan.predicted_ms == pytest.approx([1e3 * found.expert_s] * 2) and found.reason and found.moved == 0


def test_hot_experts_go_to_the_fast_rank():
    loads = {i: [200.0, 100.0, 100.0, 20.0, 20.0, 20.0, 20.0, 20.0] for i in (0, 1)}
    found = first_plan(cluster([400, 100]), loads, SIZES, PLACEMENT)
    assert set(found.plan.layer(0).experts_of_rank(0)) >= {0, 1, 2}
    assert found.expert_s == pytest.approx(found.bound_s)


def test_a_call_that_takes_long_is_counted():
    slow_call = cluster([100, 100])
    slow_call = dataclasses.replace(slow_call, expert=Speeds((0.0, 3.0), (100.0, 100.0)))
    few, many = held(first_plan(slow_call, EVEN, SIZES, PLACEMENT).plan)[::-1]
    assert few < many


def test_copies_where_they_are_allowed_and_pay():
    loads = {i: [400.0, *[16.0] * 7] for i in (0, 1)}
    without = first_plan(cluster([100] * 4), loads, SIZES, PLACEMENT)
    copied = first_plan(cluster([100] * 4), loads, SIZES, PlacementConfig(max_copies=3))
    assert without.plan.layer(0).copies == 0 < copied.plan.layer(0).copies <= 3
    assert copied.expert_s < without.expert_s / 2


def with_memory(found: Cluster, free: list[int]) -> Cluster:
    return dataclasses.replace(found, facts=tuple(dataclasses.replace(f, free_bytes=n) for f, n in zip(found.facts, free)))


def memory_for(experts: float) -> int:
    """Free bytes that a rank needs for so many experts in each of the two layers."""
    base = 4 * SIZES.dense_bytes + SIZES.sequence * SIZES.token_bytes
    return int((base + experts * 2 * 4 * SIZES.expert_bytes) / 0.8) + 1


def test_memory_caps_are_kept():
    found = first_plan(with_memory(cluster([900, 100]), [memory_for(3), 2**40]), EVEN, SIZES, PLACEMENT).plan
    assert held(found) == [3, 5]
    assert held(first_plan(cluster([900, 100]), EVEN, SIZES, PlacementConfig(max_experts=[2, 8])).plan) == [2, 6]
    capped = first_plan(cluster([900, 100]), EVEN, SIZES, PlacementConfig(max_batch=[5, 20])).plan
    assert split_batch(16, capped.batch_shares) == [5, 11]


def test_what_does_not_fit_is_refused_with_the_numbers():
    with pytest.raises(PlacementError) as caught:
        first_plan(with_memory(cluster([1, 1]), [memory_for(3), memory_for(2)]), EVEN, SIZES, PLACEMENT)
    for words in ("8 experts a layer do not fit", "[3, 2]", "GiB free", "each of 2 layers", "add ranks"):
        assert words in str(caught.value)
    with pytest.raises(PlacementError, match="a forward pass of 16 sequences does not fit"):
        first_plan(cluster([1, 1]), EVEN, SIZES, PlacementConfig(max_batch=[5, 5]))


def test_nothing_moves_while_nothing_changes():
    before = cluster([300, 100])
    old = first_plan(before, EVEN, SIZES, PLACEMENT).plan
    same = next_plan(before, EVEN, SIZES, PLACEMENT, old, 100)
    assert same.stays and same.moved == 0 and same.plan.layers == old.layers and same.plan.batch_shares == old.batch_shares
    assert next_plan(cluster([305, 99]), EVEN, SIZES, PLACEMENT, old, 100).stays  # as speeds are measured


def test_a_slower_rank_loses_experts_and_batch_and_is_named():
    old = first_plan(cluster([100, 100]), EVEN, SIZES, PLACEMENT).plan
    found = next_plan(cluster([100, 25]), EVEN, SIZES, PLACEMENT, old, 100)
    assert not found.stays and held(found.plan) == [7, 1] and found.moved == 2 * 3
    assert split_batch(16, found.plan.batch_shares) == [13, 3]
    assert found.old_expert_s == pytest.approx(2 * 256 / 25) and found.expert_s == pytest.approx(2 * 448 / 100)
    assert "experts move: rank 1 (here, cpu) does 25 expert rows/s, 0.25 times the 100 the last plan was made for" in found.reason
    assert found.reason.endswith("; batch moves: rank 1 (here, cpu) took longest outside experts, 5120 ms with 8 sequences, "
                                 "and now has 3")


def test_the_batch_moves_alone_where_only_dense_speed_changed():
    old = first_plan(cluster([100, 100]), EVEN, SIZES, PLACEMENT).plan
    batch = next_plan(cluster([100, 100], [100, 50]), EVEN, SIZES, PLACEMENT, old, 100)
    assert batch.plan.layers == old.layers and batch.reason.startswith("batch moves: rank 1 (here, cpu)")


def test_changed_loads_are_a_reason():
    first = {i: [100.0, 100.0, 100.0, 100.0, 28.0, 28.0, 28.0, 28.0] for i in (0, 1)}
    old = first_plan(cluster([100, 100]), first, SIZES, PLACEMENT).plan
    pair = [e for e in range(4) if old.layer(0).owners[e] == (0,)]
    hot = {i: [200.0 if e in pair else 112 / 6 for e in range(8)] for i in (0, 1)}  # both hot ones on one rank
    found = next_plan(cluster([100, 100]), hot, SIZES, PLACEMENT, old, 100)
    assert found.reason == "experts move: the experts' loads have changed"
    assert found.expert_s < 0.7 * found.old_expert_s and found.moved > 0


def test_a_gain_below_the_tolerance_or_within_too_few_steps_is_left():
    old = first_plan(cluster([100, 100]), EVEN, SIZES, PLACEMENT).plan
    now = cluster([100, 60])
    assert not next_plan(now, EVEN, SIZES, PLACEMENT, old, 100).stays
    assert next_plan(now, EVEN, SIZES, PlacementConfig(tolerance=0.9), old, 100).stays
    dear = dataclasses.replace(now, facts=tuple(dataclasses.replace(f, alltoall_bytes_per_s=100.0) for f in now.facts))
    assert next_plan(dear, EVEN, SIZES, PLACEMENT, old, 1).plan.layers == old.layers  # moving takes longer than it saves


def test_a_model_without_experts_has_a_batch_to_plan():
    sizes = Sizes.of(dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, moe_every=0)), 300)
    old = first_plan(cluster([100, 100]), None, sizes, PLACEMENT).plan
    assert old.layers == () and split_batch(16, old.batch_shares) == [8, 8]
    found = next_plan(cluster([100, 100], [300, 100]), {}, sizes, PLACEMENT, old, 100)
    assert split_batch(16, found.plan.batch_shares) == [12, 4]


def test_an_old_plan_that_breaks_a_limit_does_not_stay():
    old = first_plan(cluster([100, 100]), EVEN, SIZES, PLACEMENT).plan
    limited = dataclasses.replace(PLACEMENT, max_experts=[8, 1])
    found = next_plan(cluster([100, 100]), EVEN, SIZES, limited, old, horizon=100)
    assert not found.stays and held(found.plan, 0) == held(found.plan, 1) == [7, 1]


def islands_of(speeds, islands, dense=None):
    return dataclasses.replace(cluster(speeds, dense, islands=islands), apart=True)


def test_islands_that_keep_their_tokens_are_planned_each_for_itself():
    """Two ranks of 300 and 100, and one of 400: every island has all experts, and half of the batch."""
    here = islands_of([300, 100, 400], [0, 0, 1])
    found = first_plan(here, EVEN, SIZES, PLACEMENT)
    layer = found.plan.layer(0)
    assert held(found.plan) == [6, 2, 8] and layer.islands == (0, 0, 1)
    assert split_batch(16, found.plan.batch_shares)[2] == 8
    assert found.expert_s == pytest.approx(found.bound_s) and found.bound_s == pytest.approx(2 * ROWS / 2 / 400)
    assert layer.primaries.count(2) == 4, "the islands update as many experts each"
    assert Plan.from_json(found.plan.to_json()) == found.plan


def test_islands_that_keep_their_tokens_get_a_batch_for_both_kinds_of_work():
    """Island 1 is as fast outside experts, and four times slower in them."""
    plain = first_plan(cluster([400, 100], [200, 200], islands=[0, 1]), EVEN, SIZES, PLACEMENT).plan
    kept = first_plan(islands_of([400, 100], [0, 1], [200, 200]), EVEN, SIZES, PLACEMENT).plan
    assert split_batch(16, plain.batch_shares) == [8, 8]
    # a token takes 1/200 s, and 2 layers of 2 rows: 4/400 or 4/100 s; 0.015 and 0.045 s in all
    assert split_batch(16, kept.batch_shares) == [12, 4]


def test_islands_that_keep_their_tokens_are_planned_again_each_for_itself():
    old = first_plan(islands_of([100, 100, 200], [0, 0, 1]), EVEN, SIZES, PLACEMENT).plan
    assert next_plan(islands_of([102, 99, 200], [0, 0, 1]), EVEN, SIZES, PLACEMENT, old, 100).stays
    found = next_plan(islands_of([150, 50, 200], [0, 0, 1]), EVEN, SIZES, PLACEMENT, old, 100)
    assert held(old) == [4, 4, 8] and held(found.plan) == [6, 2, 8] and found.moved == 4
    apart = next_plan(islands_of([100, 300], [0, 1]), EVEN, SIZES, PLACEMENT,
                      first_plan(cluster([100, 300], islands=[0, 1]), EVEN, SIZES, PLACEMENT).plan, 100)
    assert held(apart.plan) == [8, 8], "a plan whose tokens travel does not stay"
    back = next_plan(cluster([100, 300], islands=[0, 1]), EVEN, SIZES, PLACEMENT, apart.plan, 100)
    assert held(back.plan) == [2, 6] and back.plan.layer(0).islands == ()


def aiming(found: Cluster, **more) -> Cluster:
    return dataclasses.replace(found, aims=True, **more)


def test_plans_for_routers_that_balance_by_speed_have_targets_and_stay_while_loads_go_there():
    """10 experts for speeds 4 : 2 : 1: counts 6, 3, 1 do not fill the ranks evenly, targets do; on the way from even loads to
    them nothing is moved, and the targets do not change."""
    sizes, placement = dataclasses.replace(SIZES, experts=10), PlacementConfig(tolerance=0.03)
    even = {i: [ROWS / 10] * 10 for i in (0, 1)}
    plan = first_plan(aiming(cluster([400, 200, 100])), even, sizes, placement).plan
    for _, layer in plan.layers:
        assert rank_loads(layer, layer.targets, 3) == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=1e-6)
    for part in (0.0, 0.3, 0.6, 0.9, 1.0):
        loads = {i: [ROWS * (part * q + (1 - part) / 10) for q in layer.targets] for i, layer in plan.layers}
        found = next_plan(aiming(cluster([400, 200, 100])), loads, sizes, placement, plan, 100)
        assert found.stays and found.plan.layers == plan.layers, part
    assert not first_plan(cluster([400, 200, 100]), even, sizes, placement).plan.layer(0).targets


def test_targets_follow_speeds_that_change_and_little_changes_leave_them():
    written = Plan(2, tuple((i, LayerPlan.single([0] * 4 + [1] * 4)) for i in (0, 1)), (1.0, 1.0))
    plan = written_again(written, aiming(cluster([300, 100]), fixed=True), SIZES, PLACEMENT).plan
    assert [layer.owners for _, layer in plan.layers] == [layer.owners for _, layer in written.layers]
    assert plan.layer(0).targets == (0.1875,) * 4 + (0.0625,) * 4 and plan.speeds == (300, 100)
    assert next_plan(aiming(cluster([300, 101]), fixed=True), EVEN, SIZES, PLACEMENT, plan, 100).stays
    found = next_plan(aiming(cluster([100, 100]), fixed=True), EVEN, SIZES, PLACEMENT, plan, 100)
    assert found.plan.layer(0).targets == (0.125,) * 8 and found.moved == 0
    assert held(found.plan) == [4, 4] and split_batch(16, found.plan.batch_shares) == [8, 8]
    assert found.reason.startswith("routers aim at other loads: rank 0 ") and "0.33 times the 300" in found.reason
