"""Balance, dead experts and stability of routing on loads known by hand."""

import math

import pytest
import torch

from moedist.monitor import LoadHistory, RoutingMemory, load_metrics, spread_evenly
from moedist.monitor.balance import layer_balance
from moedist.monitor.metrics import is_declared
from moedist.routing import Assignment
from moedist.routing.base import entropy_sum

# two ranks, four experts: totals 8, 4, 0, 4; rank 0 computes the first three
LOAD_WE = torch.tensor([[6, 1, 0, 3], [2, 3, 0, 1]])
ROWS = [12, 4]


def test_balance_of_one_layer():
    # mean 4, deviations 4, 0, -4, 0: variance 8
    assert layer_balance(LOAD_WE, ROWS) == pytest.approx(
        {"load_imbalance": 2.0, "load_cv": math.sqrt(8) / 4, "rank_imbalance": 1.5, "unused_experts": 1.0})
    # a rank three times as fast does its 12 rows in the time of the other's 4: perfect
    assert layer_balance(LOAD_WE, ROWS, (3.0, 1.0))["rank_imbalance"] == pytest.approx(1.0)
    # the slow rank with most rows: 12 of 16 rows take 12, all ranks together need 16 / 4
    assert layer_balance(LOAD_WE, ROWS, (1.0, 3.0))["rank_imbalance"] == pytest.approx(3.0)
    assert layer_balance(LOAD_WE, [16, 0], (1.0, 0.0))["rank_imbalance"] == pytest.approx(1.0)
    assert layer_balance(torch.zeros(2, 4), [0, 0]) == {}


def test_metrics_over_layers_and_of_the_layers_shown():
    even = torch.ones(2, 4, dtype=torch.int64)
    found = load_metrics({1: LOAD_WE, 3: even}, {1: ROWS, 3: [4, 4]}, shown=[3])
    assert all(map(is_declared, found))
    assert found == pytest.approx({
        "moe/load_imbalance": 1.5, "moe/load_cv": math.sqrt(8) / 8, "moe/rank_imbalance": 1.25, "moe/unused_experts": 1,
        "moe/layer.3/load_imbalance": 1.0, "moe/layer.3/load_cv": 0.0, "moe/layer.3/rank_imbalance": 1.0})
    assert load_metrics({}, {}) == {} == load_metrics({0: torch.zeros(2, 4)}, {0: [0, 0]})


def test_many_layers_are_thinned_out():
    assert spread_evenly(range(100), 5) == [0, 25, 50, 74, 99] and spread_evenly([4, 7], 5) == [4, 7]
    assert spread_evenly([4, 7], 1) == [4] and spread_evenly([4, 7], 0) == []


def test_dead_experts_and_window_sums():
    history = LoadHistory(dead_after=3)
    assert history.metrics() == {}
    for step in range(4):
        history.add({2: LOAD_WE if step else LOAD_WE + 1})
    assert history.sums[2].tolist() == [34, 18, 2, 18]
    assert history.dead() == {2: [2]}  # idle in the last three steps
    assert history.metrics([2]) == {"moe/dead_experts": 1.0, "moe/layer.2/dead_experts": 1.0}
    history.restart()
    history.add({2: torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0]])})
    assert history.dead() == {} and history.sums[2].tolist() == [1, 0, 1, 0]


def routed(pairs):
    tokens, experts = torch.tensor(sorted(pairs)).T
    return Assignment(tokens, experts, torch.ones(len(pairs)), torch.zeros(4, dtype=torch.int64))


def test_routing_stability():
    memory = RoutingMemory()
    memory.note(0, routed([(0, 1), (0, 2), (1, 0), (1, 3)]), 4, 2)
    memory.note(0, routed([(0, 0)]), 4, 2)  # a second pass: not of the sample
    assert memory.compare() == (0, 0)  # nothing to compare with
    memory.note(0, routed([(0, 1), (0, 3), (1, 0), (1, 3)]), 4, 2)
    assert memory.compare() == (3, 4)
    memory.note(0, routed([(0, 1), (0, 3), (1, 0), (1, 3)]), 4, 2)
    assert memory.compare() == (4, 4)


def test_router_entropy():
    probs_TE = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25] * 4, [1.0, 0.0, 0.0, 0.0]])
    assert entropy_sum(probs_TE).item() == pytest.approx(math.log(2) + math.log(4))
