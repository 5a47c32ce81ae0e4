"""What ranks did, from sums known by hand; gathered over real ranks."""

import dataclasses

import pytest
import torch

from moedist.config import config_from_dict
from moedist.monitor import METRICS, RankSums, declaration, gather_sums, measured_peak, memory_held, rank_metrics
from moedist.monitor.metrics import RANK_SERIES, is_declared, reduce_over_ranks
from moedist.phases.watch import dense_flops_per_token
from moedist.placement import LayerPlan, Plan, moved_placements
from moedist.timing import StepTimes, Traffic
from tests.ranks import run_ranks


def sums(rank: int) -> RankSums:
    """Two steps of 1 s each. Rank 0: 0.6 s in experts; rank 1: 0.2 s, for as many rows."""
    mine = RankSums(memory_bytes=(1 + rank) * 2**30, peak=1e9)
    for _ in range(2):
        times = StepTimes({0: 0.4, 3: 0.2} if rank == 0 else {0: 0.2}, 0.0, {(0, "own"): Traffic(wait_s=0.1)})
        mine.add(times, wall_s=1.0, waiting_s=0.2 if rank == 0 else 0.7, rows=600, tokens=100 * (1 + rank), flops=5e8)
    return mine


def gathered(world):
    return gather_sums(world, sums(world.rank))


def test_every_rank_has_the_sums_of_all():
    for found in run_ranks(2, gathered):
        assert found == [sums(0), sums(1)]


def test_metrics_of_ranks_by_hand():
    values = rank_metrics([sums(0), sums(1)], step_s=1.0)
    assert all(map(is_declared, values))
    assert values == pytest.approx({
        "perf/memory_gib": 2.0, "perf/slowest_rank": 0, "moe/expert_ms": 600, "moe/expert_over_mean": 1.5,
        # 1,200 rows at 1,000 and 3,000 rows/s take 300 ms
        "perf/expert_over_bound": 2.0, "perf/mfu": 0.5,
        # 300 tokens at 500 and 2,000 tokens/s take 120 ms outside the experts
        "perf/tokens_per_s_bound": 300 / 0.42,
        "rank/0/busy_ms": 800, "rank/0/expert_ms": 600, "rank/0/dense_ms": 200, "rank/0/all_to_all_ms": 100,
        "rank/0/wait_ms": 100, "rank/0/rows": 600, "rank/0/rows_per_s": 1000, "rank/0/tokens": 100, "rank/0/memory_gib": 1,
        "rank/1/busy_ms": 300, "rank/1/expert_ms": 200, "rank/1/dense_ms": 100, "rank/1/all_to_all_ms": 100,
        "rank/1/wait_ms": 600, "rank/1/rows": 600, "rank/1/rows_per_s": 3000, "rank/1/tokens": 200, "rank/1/memory_gib": 2})


def test_many_ranks_are_quantiles():
    ranks = [dataclasses.replace(sums(0), memory_bytes=r * 2**30) for r in range(41)]
    values = rank_metrics(ranks, 1.0)
    assert all(map(is_declared, values)) and sum(name.startswith("rank/") for name in values) == 5 * len(RANK_SERIES)
    assert [values[f"rank/p{q}/memory_gib"] for q in (0, 10, 50, 90, 100)] == [0, 4, 20, 36, 40]
    assert values["perf/slowest_rank"] == 0


def test_every_metric_has_a_known_reduction():
    assert {metric.reduction for metric in METRICS.values()} <= {"same", "sum", "mean", "max", "tokens", "ratio", "rank"}
    assert declaration("rank/17/busy_ms") == declaration("rank/p90/busy_ms") == METRICS["rank/*/busy_ms"]
    assert declaration("moe/layer.12/load_cv") is METRICS["moe/layer.*/load_cv"] and declaration("moe/layer.x/load_cv") is None
    assert reduce_over_ranks("moe/expert_ms", [1.0, 3.0], [1, 1]) == 3
    assert reduce_over_ranks("perf/tokens_per_s", [1.0, 3.0], []) == 4
    assert reduce_over_ranks("comm/own_island_ms", [1.0, 3.0], [9, 1]) == 2
    assert reduce_over_ranks("train/lr", [7.0, 7.0], []) == 7
    with pytest.raises(AssertionError, match="rank"):
        reduce_over_ranks("moe/dropped_fraction", [1.0], [1])


def test_peak_and_memory_are_measured(one_thread):
    assert 1e8 < measured_peak(torch.device("cpu"), torch.float32) < 1e15
    assert 50 * 2**20 < memory_held(torch.device("cpu")) < 2**40


def test_flops_of_a_token():
    config = config_from_dict({"model": {"layers": 2, "width": 8, "heads": 2, "kv_heads": 2}, "data": {"sequence_length": 16}})
    # 100 weights; attention: 12 * 2 layers * 2 heads * 4 wide * 16 tokens
    assert dense_flops_per_token(config, 100, 5) == 6 * 100 + 3072
    untied = config_from_dict({"model": {"layers": 2, "width": 8, "heads": 2, "kv_heads": 2, "tie_embeddings": False},
                               "data": {"sequence_length": 16}})
    assert dense_flops_per_token(untied, 100, 5) == 6 * 60 + 3072


def test_moved_placements():
    def plan(*owners):
        return Plan(2, ((0, LayerPlan(owners, tuple((1 / len(o),) * len(o) for o in owners))),), (1.0, 1.0))
    assert moved_placements(plan((0,), (0,), (1,)), plan((0,), (1,), (0, 1))) == 2
