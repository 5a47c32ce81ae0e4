"""Every metric a run records, with its unit and how it is reduced over ranks, and those computed from the load matrix."""

from __future__ import annotations

import re
from typing import Iterable, NamedTuple, Sequence

import torch


class Metric(NamedTuple):
    """Unit and reduction over ranks (same: every rank has the whole value already)."""

    unit: str
    reduction: str


METRICS: dict[str, Metric] = {
    "train/loss": Metric("nats per token", "mean over tokens"),
    "train/balance_loss": Metric("1 at perfect balance, mean over layers", "mean over tokens"),
    "train/z_loss": Metric("mean over layers", "mean over tokens"),
    "train/grad_norm": Metric("", "same"),
    "train/lr": Metric("", "same"),
    "train/tokens": Metric("tokens since the start", "sum"),
    "perf/tokens_per_s": Metric("tokens/s over all ranks", "sum"),
    "perf/step_ms": Metric("ms", "same"),
    "moe/load_imbalance": Metric("largest over mean rows of an expert, mean over layers", "same"),
    "moe/rank_imbalance": Metric("largest over mean rows of a rank, mean over layers", "same"),
    "moe/unused_experts": Metric("experts without a row, sum over layers", "same"),
    "moe/expert_ms": Metric("ms in expert feed-forwards, forward and backward, of the slowest rank", "max"),
    "moe/expert_over_mean": Metric("expert time of the slowest rank over the mean of all; 1 at perfect placement", "same"),
    "moe/dropped_fraction": Metric("rows dropped by capacity over rows wanted", "sum over sum"),
    "moe/router_entropy": Metric("nats, mean over layers", "mean over tokens"),
    "comm/own_island_bytes": Metric("bytes of rows sent inside islands, forward and backward", "sum"),
    "comm/other_islands_bytes": Metric("bytes of rows sent between islands, forward and backward", "sum"),
    "comm/own_island_ms": Metric("ms from start to end of exchanges inside islands, all layers", "mean over ranks"),
    "comm/other_islands_ms": Metric("ms from start to end of exchanges between islands, all layers", "mean over ranks"),
    "comm/own_island_wait_ms": Metric("ms of these in which a rank stood still", "mean over ranks"),
    "comm/other_islands_wait_ms": Metric("ms of these in which a rank stood still", "mean over ranks"),
    "comm/dedup_ratio": Metric("rows sent to experts over those without dedup; gateways' rows count again", "sum over sum"),
    "comm/rounding_error": Metric("relative error of rows rounded between islands, of a sample", "sum over sum"),
    "comm/layer.*/own_island_bytes": Metric("bytes, as above, of one layer", "sum"),
    "comm/layer.*/other_islands_bytes": Metric("bytes, as above, of one layer", "sum"),
    "comm/layer.*/own_island_ms": Metric("ms, as above, of one layer", "mean over ranks"),
    "comm/layer.*/other_islands_ms": Metric("ms, as above, of one layer", "mean over ranks"),
    "compress/ratio": Metric("share of the experts' bytes removed", "same"),
    "compress/bytes": Metric("bytes of all experts, index vectors included", "sum"),
    "compress/seconds": Metric("s", "same"),
    "checkpoint/blocked_ms": Metric("ms that training stood still for a checkpoint, on rank 0", "same"),
    "checkpoint/seconds": Metric("s from the start of a checkpoint until it was complete", "same"),
    "checkpoint/bytes": Metric("bytes of its tensors", "sum"),
    "offload/bytes": Metric("bytes of experts fetched to the devices, by an evaluation", "sum"),
    "offload/ahead_bytes": Metric("bytes of these that were read ahead of need", "sum"),
    "offload/hit_rate": Metric("pieces of experts that were there or on their way over all that were wanted", "sum over sum"),
    "offload/stall_s": Metric("s that a rank stood still for experts, of the one that did longest", "max"),
    "offload/peak_bytes": Metric("most bytes that a rank's cache held", "max"),
    "valid/loss": Metric("nats per token", "mean over tokens"),
    "valid/perplexity": Metric("", "mean over tokens"),
}


def is_declared(name: str) -> bool:
    """Whether `METRICS` has a metric, or the series it is one of, with * for the number of a layer."""
    return re.sub(r"layer\.\d+", "layer.*", name) in METRICS


def load_metrics(loads_WE: Iterable[torch.Tensor], rows_W: Iterable[Sequence[int]]) -> dict[str, float]:
    """Imbalance metrics from each layer's load matrix (rows every rank sent to every expert) and rows of each rank."""
    expert, rank, unused = [], [], 0
    for load_WE, rows in zip(loads_WE, rows_W):
        load_E = load_WE.sum(0).double()
        unused += int((load_E == 0).sum())
        if load_E.sum() > 0:
            expert.append((load_E.max() / load_E.mean()).item())
            rank.append(max(rows) * len(rows) / sum(rows))
    if not expert:
        return {}
    return {"moe/load_imbalance": sum(expert) / len(expert), "moe/rank_imbalance": sum(rank) / len(rank),
            "moe/unused_experts": unused}
