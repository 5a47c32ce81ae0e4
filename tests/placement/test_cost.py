"""Loads, makespan, bounds and the price of copies."""

import pytest

from moedist.placement import LayerPlan, Problem, bound, makespan, rank_loads
from moedist.placement.cost import COPIES_SAVE, copy_price, cost


def test_loads_and_makespan_with_copies():
    layer = LayerPlan(((0, 2), (1,)), ((0.25, 0.75), (1.0,)))
    problem = Problem((8.0, 3.0), (1.0, 1.0, 4.0))
    assert rank_loads(layer, problem.loads, 3).tolist() == [2.0, 3.0, 6.0]
    assert makespan(layer, problem) == 3.0


def test_rows_on_a_rank_without_speed_never_end():
    problem = Problem((1.0, 0.0), (1.0, 0.0))
    assert makespan(LayerPlan.single([1, 0]), problem) == float("inf")
    assert makespan(LayerPlan.single([0, 1]), problem) == 1.0  # no rows there


def test_bounds_by_hand():
    problem = Problem((6.0, 4.0, 2.0), (4.0, 2.0))
    assert bound(problem) == 2.0  # all: 12 rows at 6 rows/s
    assert bound(Problem((9.0, 2.0, 1.0), (4.0, 2.0))) == 2.25  # the largest on the fastest
    assert bound(Problem((6.0, 6.0, 0.0), (4.0, 1.0, 1.0))) == 2.4  # the two largest on the two fastest
    assert bound(Problem((9.0, 2.0, 1.0), (4.0, 2.0), max_copies=1)) == 2.0
    assert bound(Problem((9.0, 2.0, 1.0), (4.0, 2.0), max_copies=1, slots=(2, 1))) == 2.25  # no place for the copy
    assert bound(Problem((6.0, 6.0), (4.0, 8.0), slots=(2, 0))) == 3.0  # a rank without places does not count


def test_price_of_copies():
    layer = LayerPlan(((0, 1), (1,)), ((0.5, 0.5), (1.0,)))
    free = Problem((2.0, 1.0), (1.0, 2.0), max_copies=1)
    assert copy_price(free) == pytest.approx(COPIES_SAVE * 1.0 / 2)  # never free
    assert cost(layer, free) == pytest.approx(1.0 + copy_price(free))
    dear = Problem((2.0, 1.0), (1.0, 2.0), max_copies=1, copy_cost_s=0.5)
    assert cost(layer, dear) == pytest.approx(1.5)


def test_copies_that_are_possible():
    hot = {"islands": (0, 0, 1), "hot_copies": 2}
    assert Problem((1.0,) * 4, (1.0,) * 3, max_copies=3, **hot).most_copies == 5
    assert Problem((1.0,) * 4, (1.0,) * 3, max_copies=3, slots=(2, 2, 3), **hot).most_copies == 3  # places
    assert Problem((1.0,) * 4, (1.0, 1.0, 0.0), max_copies=3, **hot).free_copies == 0  # nothing can be in island 1
    assert Problem((1.0, 3.0, 2.0, 3.0), (1.0,) * 3, **hot).hottest == (1, 3)
