"""What every rank did since the last metrics: summed locally, gathered by one small collective, told rank by rank.

W ranks. With more than `MOST_RANKS` the series of single ranks give way to quantiles over ranks.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import astuple, dataclass, fields
from typing import Sequence

import numpy as np
import torch

from moedist.monitor.metrics import RANK_SERIES, reduce_over_ranks
from moedist.timing import StepTimes
from moedist.world import World

MOST_RANKS = 32
QUANTILES = (0, 10, 50, 90, 100)  # percent


@dataclass
class RankSums:
    """One rank since the last metrics: seconds and amounts are sums over steps.

    Attributes:
        wall_s: of steps; waiting_s: of these in collectives; exchange_s: of these while rows travelled; expert_s: of the rest
            in experts.
        rows, tokens: computed by its experts, and of its part of the batch.
        flops: of the model, forward and backward, that it computed for its rows and tokens.
        memory_bytes: most that it has held so far.
        peak: FLOP/s of a matrix product, see `moedist.monitor.peak`.
    """

    steps: float = 0.0
    wall_s: float = 0.0
    waiting_s: float = 0.0
    exchange_s: float = 0.0
    expert_s: float = 0.0
    rows: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    memory_bytes: float = 0.0
    peak: float = 0.0

    def add(self, times: StepTimes, wall_s: float, waiting_s: float, rows: float, tokens: float, flops: float) -> None:
        """One step."""
        self.steps += 1
        self.wall_s += wall_s
        self.waiting_s += waiting_s
        self.exchange_s += sum(link.wait_s for link in times.links.values())
        self.expert_s += sum(times.expert_s.values())
        self.rows += rows
        self.tokens += tokens
        self.flops += flops

    def values(self) -> dict[str, float]:
        """This rank's `rank/*/...`, means over steps."""
        steps = max(self.steps, 1.0)
        exchange_s = min(self.exchange_s, self.waiting_s)
        busy_s = max(self.wall_s - self.waiting_s, 0.0)
        return {"busy_ms": 1e3 * busy_s / steps, "expert_ms": 1e3 * self.expert_s / steps,
                "dense_ms": 1e3 * max(busy_s - self.expert_s, 0.0) / steps, "all_to_all_ms": 1e3 * exchange_s / steps,
                "wait_ms": 1e3 * (self.waiting_s - exchange_s) / steps, "rows": self.rows / steps,
                "rows_per_s": self.rows / self.expert_s if self.expert_s else 0.0, "tokens": self.tokens / steps,
                "memory_gib": self.memory_bytes / 2**30}


def gather_sums(world: World, mine: RankSums) -> list[RankSums]:
    """Those of every rank, on every rank: one collective of some dozens of numbers."""
    table = torch.zeros(world.size, len(fields(RankSums)), dtype=torch.float64)
    table[world.rank] = torch.tensor(astuple(mine), dtype=torch.float64)
    return [RankSums(*row) for row in world.all_reduce_(table).tolist()]


def rank_metrics(ranks: Sequence[RankSums], step_s: float) -> dict[str, float]:
    """Metrics of what the ranks did.

    Args:
        step_s: mean wall time of these steps.
    """
    of_ranks = [rank.values() for rank in ranks]
    tokens_W = [rank.tokens for rank in ranks]
    expert_W = [of["expert_ms"] for of in of_ranks]
    values = {"perf/memory_gib": reduce_over_ranks("perf/memory_gib", [of["memory_gib"] for of in of_ranks], tokens_W),
              "perf/slowest_rank": float(max(range(len(ranks)), key=lambda r: of_ranks[r]["busy_ms"]))}
    if any(expert_W):
        slowest = reduce_over_ranks("moe/expert_ms", expert_W, tokens_W)
        values |= {"moe/expert_ms": slowest, "moe/expert_over_mean": slowest * len(ranks) / sum(expert_W)}
        speed = sum(of["rows_per_s"] for of in of_ranks)
        if speed:
            values["perf/expert_over_bound"] = slowest / (1e3 * sum(of["rows"] for of in of_ranks) / speed)
    least_s = _least_s(of_ranks, "rows", "expert_ms") + _least_s(of_ranks, "tokens", "dense_ms")
    if least_s:
        values["perf/tokens_per_s_bound"] = sum(of["tokens"] for of in of_ranks) / least_s
    peak, steps = sum(rank.peak for rank in ranks), max(ranks[0].steps, 1.0)
    if peak and step_s:
        values["perf/mfu"] = sum(rank.flops for rank in ranks) / steps / step_s / peak
    return values | rank_series(of_ranks)


def _least_s(of_ranks: Sequence[dict[str, float]], amount: str, ms: str) -> float:
    """Seconds that all ranks together take for an amount at the speeds that each has shown for its part."""
    speed = sum(1e3 * of[amount] / of[ms] for of in of_ranks if of[ms] > 0)
    return sum(of[amount] for of in of_ranks) / speed if speed else 0.0


def rank_series(of_ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    """`rank/{r}/...` of up to `MOST_RANKS` ranks; beyond, `rank/p50/...` and so on: quantiles over ranks, in percent."""
    if len(of_ranks) <= MOST_RANKS:
        return {f"rank/{r}/{name}": of[name] for r, of in enumerate(of_ranks) for name in RANK_SERIES}
    found = {}
    for name in RANK_SERIES:
        quantiles = np.percentile([of[name] for of in of_ranks], QUANTILES)
        found |= {f"rank/p{q}/{name}": float(value) for q, value in zip(QUANTILES, quantiles)}
    return found


def memory_held(device: torch.device) -> int:
    """Bytes: the most that this process has held on its accelerator; on a CPU, its largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "xpu":
        return torch.xpu.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
