"""Facts of ranks that are not there."""

from __future__ import annotations

from typing import Sequence

from moedist.coordinator.facts import RankFacts


def facts_of(speeds: Sequence[float], dense: Sequence[float] | None = None, call_s: float = 0.0, free_bytes: int = 2**40,
             measured: bool = True, islands: Sequence[int] | None = None) -> list[RankFacts]:
    """Ranks with these expert rows and dense tokens per second."""
    return [RankFacts(rank=r, host="here", device="cpu", vendor="cpu", device_name="cpu",
                      island=(islands or [0] * len(speeds))[r], expert_call_s=call_s,
                      expert_rows_per_s=s, expert_spread=0.0, dense_call_s=call_s,
                      dense_tokens_per_s=(dense or speeds)[r], dense_spread=0.0, alltoall_bytes_per_s=1e9,
                      alltoall_latency_s=0.0, host_copy_bytes_per_s=0.0, free_bytes=free_bytes, total_bytes=free_bytes,
                      measured=measured) for r, s in enumerate(speeds)]
