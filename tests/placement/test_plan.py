"""Plans as data, and plans from a configuration."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedist.config import config_from_dict
from moedist.errors import PlacementError
from moedist.placement import LayerPlan, Plan, equal_counts, plan_from_config, split_batch


def plan(world_size: int, *overrides: str) -> Plan:
    return plan_from_config(config_from_dict({}, overrides), world_size)


def owners(p: Plan) -> list[int]:
    return p.layers[0][1].primaries


@given(st.integers(0, 1000), st.lists(st.floats(0, 100), min_size=1, max_size=9).filter(lambda s: sum(s) > 1e-3))
def test_split_batch_conserves_and_is_within_one_of_exact(total, shares):
    parts = split_batch(total, shares)
    assert sum(parts) == total
    for part, share in zip(parts, shares):
        assert abs(part - total * share / sum(shares)) < 1 + 1e-6


def test_split_batch_by_hand():
    assert split_batch(32, [5, 3]) == [20, 12]
    assert split_batch(1, [1, 1, 1]) == [1, 0, 0]
    with pytest.raises(PlacementError):
        split_batch(4, [0, 0])


@given(st.integers(0, 100), st.integers(1, 10))
def test_equal_counts(total, parts):
    counts = equal_counts(total, parts)
    assert sum(counts) == total and max(counts) - min(counts) <= 1


def test_equal_by_default_even_when_it_does_not_divide():
    assert owners(plan(3)) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert owners(plan(16)) == list(range(8))


def test_counts_and_owners():
    assert owners(plan(2, "placement.counts=[5,3]")) == [0] * 5 + [1] * 3
    assert owners(plan(3, "placement.counts=[0,8,0]")) == [1] * 8
    assert owners(plan(2, "placement.owners={0: [7, 1], 1: [0, 2, 3, 4, 5, 6]}")) == [1, 0, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("override, words", [
    ("placement.counts=[5,4]", ["sums to 9", "experts is 8"]),
    ("placement.counts=[8]", ["names 1 ranks", "world has 2", "[4, 4]"]),
    ("placement.counts=[9,-1]", ["-1"]),
    ("placement.owners={0: [0, 1, 2, 3], 1: [4, 5, 7]}", ["experts [6]", "without an owner"]),
    ("placement.owners={0: [0, 1, 2, 3], 1: [3, 4, 5, 6, 7]}", ["expert 3", "ranks 0 and 1"]),
    ("placement.owners={0: [0, 1, 2, 3], 2: [4, 5, 6, 7]}", ["rank 2", "0..1"]),
    ("placement.owners={0: [0, 1, 2, 3, 8], 1: [4, 5, 6, 7]}", ["expert 8", "0..7"]),
    ("placement.batch_shares=[1]", ["1 entries", "2 ranks"]),
    ("placement.batch_shares=[0,0]", ["above 0"]),
])
def test_wrong_placements_are_refused_with_numbers(override, words):
    with pytest.raises(PlacementError) as error:
        plan(2, override)
    for word in words:
        assert word in str(error.value)


def test_owners_and_counts_exclude_each_other():
    with pytest.raises(PlacementError, match="choose one"):
        plan(2, "placement.counts=[4,4]", "placement.owners={0: [0], 1: [1]}")


def test_json_round_trip_and_hash():
    a = plan(2, "placement.counts=[5,3]", "placement.batch_shares=[2,1]")
    b = Plan.from_json(a.to_json())
    assert a == b and a.sha256 == b.sha256
    assert a.sha256 != plan(2, "placement.counts=[3,5]", "placement.batch_shares=[2,1]").sha256


def test_copies_are_data():
    layer = LayerPlan(((0, 1), (1,)), ((0.25, 0.75), (1.0,)))
    assert layer.experts_of_rank(1) == [0, 1]
    assert layer.copies == 1 and layer.primaries == [0, 1]
    for bad in (LayerPlan(((),), ((),)), LayerPlan(((0, 1),), ((0.5, 0.6),)), LayerPlan(((2,),), ((1.0,),))):
        with pytest.raises(PlacementError):
            Plan(2, ((0, bad),), (1.0, 1.0))
