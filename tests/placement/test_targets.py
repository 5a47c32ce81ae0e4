"""Loads that routers are to aim at, so that ranks of any speeds are done together where experts stay."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moedist.errors import PlacementError
from moedist.placement import LayerPlan, Plan, Problem, furthest, makespan, rank_loads, target_shares


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_with_these_loads_every_rank_is_done_at_the_bound(data):
    ranks = data.draw(st.integers(1, 5))
    owners = data.draw(st.lists(st.integers(0, ranks - 1), min_size=ranks, max_size=12))
    owners = [*range(ranks), *owners]  # every rank has an expert
    speeds = data.draw(st.lists(st.floats(0.1, 16), min_size=ranks, max_size=ranks))
    costs = data.draw(st.lists(st.floats(0.2, 1), min_size=len(owners), max_size=len(owners)))
    layer = LayerPlan.single(owners)
    q = target_shares(layer, speeds, costs)
    assert sum(q) == pytest.approx(1, abs=1e-6) and min(q) > 0
    work = [1e6 * share * cost for share, cost in zip(q, costs)]
    found = rank_loads(layer, work, ranks) / speeds
    assert found == pytest.approx(np.full(ranks, sum(work) / sum(speeds)), rel=1e-3)
    assert makespan(layer, Problem(tuple(work), tuple(speeds))) <= 1.001 * sum(work) / sum(speeds)
    for r in range(ranks):  # nothing sets experts of one rank apart but what a row of theirs costs
        of_rank = [work[e] for e in layer.experts_of_rank(r)]
        assert max(of_rank) == pytest.approx(min(of_rank), rel=1e-3)


def test_copies_are_counted_by_their_shares():
    layer = LayerPlan(((0,), (0, 1), (1, 2), (2,)), ((1.0,), (0.5, 0.5), (0.25, 0.75), (1.0,)))
    q = target_shares(layer, [3, 2, 1])
    assert rank_loads(layer, q, 3) == pytest.approx([3 / 6, 2 / 6, 1 / 6], abs=1e-3)


def test_where_no_loads_fit_the_nearest_are_taken():
    """Both experts are on both ranks by halves: whatever the loads, so is the work."""
    layer = LayerPlan(((0, 1), (0, 1)), ((0.5, 0.5), (0.5, 0.5)))
    assert target_shares(layer, [3, 1]) == (0.5, 0.5)


def test_a_rank_without_speed_may_have_no_experts():
    assert target_shares(LayerPlan.single([0, 2]), [1, 0, 1]) == (0.5, 0.5)
    with pytest.raises(PlacementError, match=r"rank 1 has experts \[1\] but speed 0"):
        target_shares(LayerPlan.single([0, 1]), [1, 0])


def test_a_plan_keeps_its_targets_and_its_hash_knows_them():
    layer = LayerPlan(((0,), (0,), (1,)), ((1.0,),) * 3, targets=target_shares(LayerPlan.single([0, 0, 1]), [3, 1]))
    plan = Plan(2, ((1, layer),), (1.0, 1.0), (3.0, 1.0))
    assert Plan.from_json(plan.to_json()) == plan and plan.layer(1).targets == (0.375, 0.375, 0.25)
    assert Plan(2, ((1, LayerPlan.single([0, 0, 1])),), (1.0, 1.0), (3.0, 1.0)).sha256 != plan.sha256
    with pytest.raises(PlacementError, match="3 experts"):
        Plan(2, ((1, LayerPlan(layer.owners, layer.shares, targets=(0.5, 0.5))),), (1.0, 1.0))
    assert furthest((0.5, 0.5), (0.4, 0.6)) == pytest.approx(0.2) and furthest((), (1.0,)) == float("inf")
