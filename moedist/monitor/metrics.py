"""Every metric a run records, declared once: its unit, how it is reduced over ranks, and what it is.

Reductions: `same` (every rank has the value of all), `sum`, `mean`, `max` over ranks, `tokens` (mean over ranks, weighted by
their tokens), `ratio` (a sum over ranks over another sum over ranks), `rank` (one value a rank, never reduced; quantiles over
ranks where there are many).
"""

from __future__ import annotations

import re
from typing import NamedTuple, Sequence

SERIES = {"layer": r"layer\.\d+", "rank": r"rank/(?:\d+|p\d+)"}  # one metric of many layers or ranks: declared with a *


class Metric(NamedTuple):
    """Unit (empty: a plain number), reduction over ranks, and meaning."""

    unit: str
    reduction: str
    text: str


_WHAT_RANKS_DO = {
    "busy_ms": ("ms", "computing, in a step"),
    "expert_ms": ("ms", "in expert feed-forwards, forward and backward, in a step"),
    "dense_ms": ("ms", "computing outside the experts, in a step"),
    "all_to_all_ms": ("ms", "standing still in exchanges of rows, until slower ranks come and rows have travelled, in a "
                            "step"),
    "wait_ms": ("ms", "standing still in other collectives, which wait for the slowest rank, in a step"),
    "rows": ("rows", "computed by its experts in a step, all layers"),
    "rows_per_s": ("rows/s", "speed of its experts, as measured in these steps"),
    "tokens": ("tokens", "of its part of the batch"),
    "memory_gib": ("GiB", "most memory held so far: of the accelerator, else of the process"),
}

METRICS: dict[str, Metric] = {
    "train/loss": Metric("nats per token", "tokens", "cross entropy of the next token"),
    "train/perplexity": Metric("", "tokens", "exp of train/loss"),
    "train/balance_loss": Metric("", "tokens", "1 at perfect balance, mean over layers"),
    "train/z_loss": Metric("", "tokens", "router z-loss, mean over layers"),
    "train/router_loss": Metric("", "tokens", "other losses of the router, each times its weight, mean over layers"),
    "train/grad_norm": Metric("", "same", "global norm of dense and expert gradients before clipping"),
    "train/lr": Metric("", "same", "learning rate"),
    "train/tokens": Metric("tokens", "sum", "read since the start: the x-axis"),
    "train/skipped_steps": Metric("steps", "same", "not taken since the start of the process: values were not finite"),
    "perf/tokens_per_s": Metric("tokens/s", "sum", "over all ranks"),
    "perf/tokens_per_s_bound": Metric("tokens/s", "ratio", "if no rank ever waited: all tokens and rows at the sum of the "
                                                           "ranks' measured speeds, and rows travelled in no time"),
    "perf/step_ms": Metric("ms", "same", "wall time of a step"),
    "perf/mfu": Metric("", "ratio", "model FLOP/s over the sum of the ranks' measured peaks of a matrix product"),
    "perf/expert_over_bound": Metric("", "ratio", "expert time of the slowest rank over what all ranks at their measured "
                                                  "speeds need; 1 is perfect"),
    "perf/memory_gib": Metric("GiB", "max", "most memory that a rank has held so far"),
    "perf/slowest_rank": Metric("rank", "same", "the one that computes longest"),
    "perf/slowest_rank_name": Metric("name", "same", "its number, host and device"),
    "perf/logging_ms": Metric("ms", "same", "of the logging step before, on rank 0"),
    "moe/load_imbalance": Metric("", "same", "largest over mean rows of an expert, mean over layers"),
    "moe/load_cv": Metric("", "same", "standard deviation over mean of the rows of experts, mean over layers"),
    "moe/rank_imbalance": Metric("", "same", "largest rows over speed of a rank, over all rows over all speeds, mean over "
                                             "layers; speeds are those of the plan, equal where nothing was measured"),
    "moe/unused_experts": Metric("experts", "same", "without a row in this step, sum over layers"),
    "moe/dead_experts": Metric("experts", "same", "without a row for monitor.dead_after steps, sum over layers"),
    "moe/expert_ms": Metric("ms", "max", "in expert feed-forwards, forward and backward, of the slowest rank"),
    "moe/expert_over_mean": Metric("", "ratio", "expert time of the slowest rank over the mean of all; 1 where none waits"),
    "moe/dropped_fraction": Metric("", "ratio", "rows dropped by capacity over rows wanted"),
    "moe/router_entropy": Metric("nats", "tokens", "of the routing distribution of a token, mean over layers"),
    "moe/routing_stability": Metric("", "ratio", "share of the (token, expert) pairs of the evaluation before that are still "
                                                 "chosen, on the same validation tokens"),
    "moe/layer.*/load_imbalance": Metric("", "same", "as above, of one layer"),
    "moe/layer.*/load_cv": Metric("", "same", "as above, of one layer"),
    "moe/layer.*/rank_imbalance": Metric("", "same", "as above, of one layer"),
    "moe/layer.*/dead_experts": Metric("experts", "same", "as above, of one layer"),
    "comm/own_island_bytes": Metric("bytes", "sum", "rows sent inside islands, forward and backward"),
    "comm/other_islands_bytes": Metric("bytes", "sum", "rows sent between islands, forward and backward"),
    "comm/own_island_ms": Metric("ms", "mean", "from start to end of exchanges inside islands, all layers"),
    "comm/other_islands_ms": Metric("ms", "mean", "from start to end of exchanges between islands, all layers"),
    "comm/own_island_wait_ms": Metric("ms", "mean", "of these, in which a rank stood still"),
    "comm/other_islands_wait_ms": Metric("ms", "mean", "of these, in which a rank stood still"),
    "comm/dedup_ratio": Metric("", "ratio", "rows sent to experts over those without dedup; gateways' rows count again"),
    "comm/rounding_error": Metric("", "ratio", "relative error of rows rounded between islands, of a sample"),
    "comm/layer.*/own_island_bytes": Metric("bytes", "sum", "as above, of one layer"),
    "comm/layer.*/other_islands_bytes": Metric("bytes", "sum", "as above, of one layer"),
    "comm/layer.*/own_island_ms": Metric("ms", "mean", "as above, of one layer"),
    "comm/layer.*/other_islands_ms": Metric("ms", "mean", "as above, of one layer"),
    "plan/version": Metric("plans", "same", "the how-manieth plan of the process is in force"),
    "plan/moved_experts": Metric("placements", "same", "changed by re-plans since the metrics before"),
    "plan/copies": Metric("experts", "same", "placements beyond one an expert, all layers"),
    "plan/predicted_ms": Metric("ms", "max", "expert time of the slowest rank in a step, as the plan predicts it"),
    "plan/actual_ms": Metric("ms", "max", "expert time of the slowest rank in a step, as it was"),
    "compress/ratio": Metric("", "same", "share of the experts' bytes removed"),
    "compress/bytes": Metric("bytes", "sum", "of all experts, index vectors included"),
    "compress/seconds": Metric("s", "same", "of the compression, calibration and evaluation included"),
    "checkpoint/blocked_ms": Metric("ms", "same", "that training stood still for a checkpoint, on rank 0"),
    "checkpoint/seconds": Metric("s", "same", "from the start of a checkpoint until it was complete"),
    "checkpoint/bytes": Metric("bytes", "sum", "of its tensors"),
    "offload/bytes": Metric("bytes", "sum", "of experts fetched to the devices, by an evaluation"),
    "offload/ahead_bytes": Metric("bytes", "sum", "of these, read ahead of need"),
    "offload/hit_rate": Metric("", "ratio", "pieces of experts that were there or on their way, over all that were wanted"),
    "offload/stall_s": Metric("s", "max", "that a rank stood still for experts"),
    "offload/peak_bytes": Metric("bytes", "max", "most that a rank's cache held"),
    "valid/loss": Metric("nats per token", "tokens", "cross entropy of the next token, validation split"),
    "valid/perplexity": Metric("", "tokens", "exp of valid/loss"),
    **{f"rank/*/{name}": Metric(unit, "rank", text) for name, (unit, text) in _WHAT_RANKS_DO.items()},
}
RANK_SERIES = tuple(_WHAT_RANKS_DO)


def declaration(name: str) -> Metric | None:
    """The declaration of a metric, or of the series it is one of; None where there is none."""
    for word, pattern in SERIES.items():
        name = re.sub(pattern, word + (".*" if word == "layer" else "/*"), name)
    return METRICS.get(name)


def is_declared(name: str) -> bool:
    """Whether `METRICS` has a metric, or the series it is one of."""
    return declaration(name) is not None


def reduce_over_ranks(name: str, values_W: Sequence[float], tokens_W: Sequence[float]) -> float:
    """One number from every rank's, as `name` is declared.

    >>> reduce_over_ranks("train/loss", [2.0, 5.0], [100, 50])
    3.0
    """
    reduction = METRICS[name].reduction
    if reduction == "same":
        return values_W[0]
    if reduction == "sum":
        return sum(values_W)
    if reduction == "mean":
        return sum(values_W) / len(values_W)
    if reduction == "max":
        return max(values_W)
    assert reduction == "tokens", f"{name} is a {reduction}: it is not made of every rank's value of it"
    return sum(v * n for v, n in zip(values_W, tokens_W)) / max(sum(tokens_W), 1)
