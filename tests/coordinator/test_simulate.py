"""Predicted step times, by hand, and never below the bound."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedist.config import PlacementConfig, config_from_dict
from moedist.coordinator.cluster_file import Kind, facts_of, with_one_more_node
from moedist.coordinator.planning import Cluster, first_plan
from moedist.coordinator.simulate import bound_s, equal_plan_of, predict
from moedist.coordinator.sizes import Sizes
from moedist.coordinator.speeds import Speeds
from moedist.placement import LayerPlan, Plan
from tests.coordinator import ranks_of

SIZES = dataclasses.replace(Sizes.of(config_from_dict({
    "data": {"sequence_length": 10}, "train": {"batch": 8, "accumulate": 2},
    "model": {"layers": 2, "width": 4, "heads": 1, "kv_heads": 1, "experts": 4, "top_k": 1, "expert_hidden": 8}}), 300),
    expert_bytes=1000, dense_bytes=5000, row_bytes=16)
LOADS = {0: [40.0, 20.0, 10.0, 10.0], 1: [20.0] * 4}


def cluster(expert: list[tuple[float, float]], dense: list[tuple[float, float]], link: float = 0.0,
            latency: float = 0.0) -> Cluster:
    """(call seconds, amount per second) of every rank."""
    facts = [dataclasses.replace(f, alltoall_bytes_per_s=link, alltoall_latency_s=latency)
             for f in ranks_of.facts_of([s for _, s in expert])]
    return Cluster(tuple(facts), Speeds(*map(tuple, zip(*expert))), Speeds(*map(tuple, zip(*dense))))


def plan(owners: list[tuple[int, ...]], batch: list[float]) -> Plan:
    layer = LayerPlan(tuple(owners), tuple((1 / len(o),) * len(o) for o in owners))
    return Plan(len(batch), ((0, layer), (1, layer)), tuple(batch))


def test_a_step_by_hand():
    """Two forward passes of 4 sequences of 10 tokens; rank 0 has experts 0 and 1 and three sequences of four."""
    here = cluster([(0.1, 100.0), (0.0, 10.0)], [(1.0, 20.0), (0.5, 10.0)])
    found = predict(here, plan([(0,), (0,), (1,), (1,)], [3, 1]), LOADS, SIZES)
    # experts, layer 0: rank 0 2 * 0.1 + 60/100, rank 1 20/10; layer 1: rank 0 0.2 + 40/100, rank 1 40/10
    assert found.rank_expert_s == pytest.approx((0.8 + 0.6, 2.0 + 4.0)) and found.expert_s == pytest.approx(2.0 + 4.0)
    # dense: rank 0 2 * 1.0 + 60/20, rank 1 2 * 0.5 + 20/10
    assert found.rank_dense_s == pytest.approx((5.0, 3.0)) and found.dense_s == pytest.approx(5.0)
    assert found.exchange_s == found.sync_s == 0 and found.total_s == pytest.approx(11.0)


def test_links_by_hand():
    here = cluster([(0, 100.0)] * 2, [(0, 10.0)] * 2, 1000.0, 0.01)
    found = predict(here, plan([(0,), (0,), (1,), (1,)], [3, 1]), LOADS, SIZES)
    # layer 0: rank 0 has 3/4 of the batch and 60/80 of the rows: 80 * 3/4 * 1/4 = 15 rows go, and 15 come
    # layer 1: half of the rows; it sends 80 * 3/4 * 1/2 = 30
    assert found.exchange_s == pytest.approx(4 * (2 * 0.01 * 2 + (15 + 30) * 16 / 1000))
    assert found.sync_s == pytest.approx(2 * 5000 / 1000)


def test_copies_travel_at_once_and_the_rank_with_most_takes_longest():
    owners = [(0, 1, 2), (1,), (2,), (2,)]
    found = predict(cluster([(0, 100.0)] * 3, [(0, 10.0)] * 3, 1000.0), plan(owners, [1, 1, 1]), LOADS, SIZES)
    assert found.sync_s == pytest.approx(2 * (5000 + 2 * 2 * 1000) / 1000)  # rank 0: two copies in each of two layers


def test_a_rank_that_holds_nothing_of_a_layer_does_not_wait_for_its_call():
    found = predict(cluster([(9.0, 100.0), (0.0, 100.0)], [(0, 10.0)] * 2), plan([(1,)] * 4, [1, 1]), LOADS, SIZES)
    assert found.rank_expert_s == pytest.approx((0, 1.6))


RANKS = st.lists(st.tuples(st.floats(0, 0.2), st.floats(1, 1e3)), min_size=3, max_size=3)


@given(RANKS, RANKS, st.lists(st.sets(st.integers(0, 2), min_size=1), min_size=4, max_size=4),
       st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(sum))
def test_no_plan_is_faster_than_the_bound(expert, dense, owners, batch):
    here = cluster(expert, dense)
    found = predict(here, plan([tuple(sorted(o)) for o in owners], batch), LOADS, SIZES)
    dense_bound, expert_bound = bound_s(here, LOADS, SIZES)
    assert found.dense_s >= dense_bound * (1 - 1e-9) and found.expert_s >= expert_bound * (1 - 1e-9)


def test_the_bound_by_hand():
    here = cluster([(0, 30.0), (0, 10.0)], [(0, 10.0), (0, 30.0)])
    assert bound_s(here, LOADS, SIZES) == pytest.approx((80 / 40, 2 * 80 / 40))


def test_a_planned_step_is_faster_than_an_equal_one_and_one_more_node_faster_still():
    sizes = Sizes.of(config_from_dict({"data": {"sequence_length": 64}, "train": {"batch": 64}, "model": {
        "layers": 2, "width": 64, "heads": 2, "kv_heads": 1, "experts": 32, "top_k": 2, "expert_hidden": 64}}), 300)
    loads = {i: [sizes.rows / 32] * 32 for i in sizes.moe_layers}
    kinds = [Kind("fast", 2, 1, "nvidia", 4e5, 0, 4e5, 0, 10, 1), Kind("slow", 2, 2, "amd", 1e5, 0, 1e5, 0, 10, 1)]
    facts = facts_of(kinds)

    def step(facts, plan=None):
        here = Cluster(facts, Speeds((0.0,) * len(facts), tuple(f.expert_rows_per_s for f in facts)),
                       Speeds((0.0,) * len(facts), tuple(f.dense_tokens_per_s for f in facts)))
        plan = plan or first_plan(here, loads, sizes, PlacementConfig()).plan
        return predict(here, plan, loads, sizes)

    planned, equal = step(facts), step(facts, equal_plan_of(4, sizes))
    # four ranks at the speed of the slowest, over 4 + 4 + 1 + 1
    assert planned.dense_s + planned.expert_s == pytest.approx(0.4 * (equal.dense_s + equal.expert_s), rel=0.05)
    assert planned.total_s < equal.total_s
    for kind in kinds:
        bigger = step(with_one_more_node(facts, kind))
        assert bigger.dense_s < planned.dense_s and bigger.expert_s < planned.expert_s
