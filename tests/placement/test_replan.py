"""When a plan stays, when a few experts move, and when all is planned anew."""

from dataclasses import replace

import pytest
from hypothesis import given, settings

from moedist.placement import LayerPlan, Plan, Problem, bound, makespan, plan_layer, replan_layer
from moedist.placement.replan import match_ranks, moved
from tests.placement.problems import problems, zipf_problem

PROBLEM = zipf_problem(8, 32, 8, 0.6, max_copies=4)


def grown(problem: Problem, expert: int, factor: float) -> Problem:
    return replace(problem, loads=tuple(f * factor if e == expert else f for e, f in enumerate(problem.loads)))


def test_stays_when_nothing_changed():
    old = plan_layer(PROBLEM)
    new = replan_layer(PROBLEM, old, move_cost_s=1e-3)
    assert (new.layer, new.kind, new.moved) == (old, "stay", 0)
    assert new.makespan_s == new.old_makespan_s == makespan(old, PROBLEM)


def test_stays_within_the_tolerance():
    old, later = plan_layer(PROBLEM), grown(PROBLEM, 0, 1.1)
    assert replan_layer(later, old, tolerance=0.5).layer == old
    loose, tight = (replan_layer(later, old, tolerance=t) for t in (0.1, 0.0))
    assert tight.makespan_s <= loose.makespan_s


def test_moves_few_when_one_expert_grows():
    old = plan_layer(replace(PROBLEM, max_copies=0))
    grows = max(old.experts_of_rank(0), key=lambda e: PROBLEM.loads[e])
    later = replace(grown(PROBLEM, grows, 3), max_copies=0)
    move_s = 0.2 * bound(later)  # a move takes as long as a fifth of a step's experts, which makes 21 of them too dear
    new = replan_layer(later, old, move_cost_s=move_s, horizon_steps=20)
    assert new.kind == "moves" and 1 <= new.moved <= 4
    assert new.makespan_s < 0.9 * new.old_makespan_s
    assert new.moved < moved(old, plan_layer(later))


def test_horizon_and_move_cost_decide():
    old = plan_layer(replace(PROBLEM, max_copies=0))
    grows = max(old.experts_of_rank(0), key=lambda e: PROBLEM.loads[e])
    later = replace(grown(PROBLEM, grows, 3), max_copies=0)
    saved_s = makespan(old, later) - bound(later)
    assert replan_layer(later, old, move_cost_s=2 * saved_s, horizon_steps=1).kind == "stay"
    assert replan_layer(later, old, move_cost_s=2 * saved_s, horizon_steps=1000).moved > 0
    assert replan_layer(later, old, move_cost_s=0.0, horizon_steps=1).moved > 0


def test_shares_alone_move_nothing():
    """Two ranks that both hold both experts: when one slows down, only the shares change."""
    old = LayerPlan(((0, 1), (0, 1)), ((0.5, 0.5), (0.5, 0.5)))
    new = replan_layer(Problem((4.0, 4.0), (3.0, 1.0), max_copies=2), old, move_cost_s=100.0)
    assert (new.kind, new.moved, new.layer.owners) == ("stay", 0, old.owners)
    assert new.makespan_s == pytest.approx(2.0, rel=1e-6) and new.old_makespan_s == 4.0


def test_leaves_a_rank_that_has_no_speed_any_more():
    problem = Problem((1.0,) * 6, (1.0, 1.0, 1.0))
    old = LayerPlan.single([0, 0, 1, 1, 2, 2])
    new = replan_layer(replace(problem, speeds=(1.0, 1.0, 0.0)), old, move_cost_s=100.0)
    assert new.old_makespan_s == float("inf") and new.makespan_s == 3.0
    assert new.kind == "moves" and new.moved == 2 and not new.layer.experts_of_rank(2)


def test_keeps_new_limits_whatever_that_costs():
    old = LayerPlan(((0, 1), (1,), (0,), (1,)), ((0.5, 0.5), (1.0,), (1.0,), (1.0,)))
    fewer = replan_layer(Problem((2.0, 1.0, 1.0, 1.0), (1.0, 1.0), max_copies=0), old, move_cost_s=100.0)
    assert fewer.layer.copies == 0 and fewer.moved == 0  # the copy goes, nothing else
    small = replan_layer(Problem((2.0, 1.0, 1.0, 1.0), (1.0, 1.0), slots=(3, 1)), old, move_cost_s=100.0)
    assert len(small.layer.experts_of_rank(1)) == 1


def test_the_hottest_get_their_copies_when_they_change():
    problem = Problem((8.0, 4.0, 2.0, 1.0), (2.0, 2.0, 2.0, 2.0), islands=(0, 0, 1, 1), hot_copies=1)
    old = plan_layer(problem)
    assert {problem.islands[r] for r in old.owners[0]} == {0, 1}
    later = replace(problem, loads=(4.0, 9.0, 2.0, 1.0))
    new = replan_layer(later, old, move_cost_s=100.0)
    assert {problem.islands[r] for r in new.layer.owners[1]} == {0, 1} and new.layer.copies == 1
    near = replace(problem, loads=(4.0, 4.01, 2.0, 1.0))  # nearly the same load: no reason to move
    assert {problem.islands[r] for r in replan_layer(near, old, move_cost_s=100.0).layer.owners[0]} == {0, 1}


def test_equal_ranks_change_names_not_experts():
    speeds = (4.0, 4.0, 1.0, 1.0)
    problem = Problem(tuple(float(f) for f in range(1, 11)), speeds)
    new = plan_layer(problem)
    swap = [1, 0, 3, 2]
    old = LayerPlan.single([swap[r] for r in new.primaries])
    assert moved(old, new) == 10
    matched = match_ranks(new, old, problem)
    assert matched == old and makespan(matched, problem) == makespan(new, problem)
    other_islands = replace(problem, islands=(0, 1, 0, 1))
    assert match_ranks(new, old, other_islands) == new
    few_places = replace(problem, slots=(len(new.experts_of_rank(0)), 10, 10, 10))
    kept = match_ranks(new, old, few_places)
    assert len(kept.experts_of_rank(0)) <= few_places.capacity[0]


@settings(max_examples=60, deadline=None)
@given(problems(experts=(2, 16), ranks=(2, 6), most_copies=6), problems(experts=(2, 16), ranks=(2, 6), most_copies=6))
def test_what_every_replan_keeps(problem, other):
    """From the plan of other loads and speeds to those of `problem`."""
    experts, ranks = len(problem.loads), len(problem.speeds)
    before = Problem((other.loads * 8)[:experts], (*(other.speeds * 3)[:ranks - 1], 1.0), max_copies=other.max_copies)
    old = plan_layer(before)
    new = replan_layer(problem, old, move_cost_s=0.01 * problem.fluid_s)
    Plan(ranks, ((0, new.layer),), (1.0,) * ranks)
    assert new.makespan_s <= new.old_makespan_s * 1.001 or new.kind != "stay"
    assert new.moved == moved(old, new.layer)
    held = [len(new.layer.experts_of_rank(r)) for r in range(ranks)]
    assert all(n <= room for n, room in zip(held, problem.capacity))
    assert new.layer.copies <= problem.most_copies
    again = replan_layer(problem, new.layer, move_cost_s=0.01 * problem.fluid_s)
    assert again.kind == "stay" or again.makespan_s < new.makespan_s * (1 + 1e-9)
