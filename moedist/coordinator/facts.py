"""What was measured of a rank: plain data, JSON both ways."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Sequence


@dataclass(frozen=True)
class RankFacts:
    """One rank.

    Attributes:
        host, device, vendor, device_name: where it runs.
        island: ranks of one island share a native collective library.
        expert_call_s, expert_rows_per_s: the experts of one layer take call_s + rows / rows_per_s, forward and backward.
        dense_call_s, dense_tokens_per_s: all of the model but the experts takes call_s + tokens / tokens_per_s.
        expert_spread, dense_spread: interquartile range over median, of the rounds measured.
        alltoall_bytes_per_s, alltoall_latency_s: row exchanges as this rank sees them; 0 in a world of one.
        host_copy_bytes_per_s: between device and host; 0 on a CPU.
        free_bytes, total_bytes: memory of the device; on a CPU, this rank's part of the machine's.
        measured: False where the speeds were given, not measured.
    """

    rank: int
    host: str
    device: str
    vendor: str
    device_name: str
    island: int
    expert_call_s: float
    expert_rows_per_s: float
    expert_spread: float
    dense_call_s: float
    dense_tokens_per_s: float
    dense_spread: float
    alltoall_bytes_per_s: float
    alltoall_latency_s: float
    host_copy_bytes_per_s: float
    free_bytes: int
    total_bytes: int
    measured: bool


def facts_to_json(facts: Sequence[RankFacts]) -> str:
    """A list with one object a rank, its keys the attributes of `RankFacts`."""
    return json.dumps([dataclasses.asdict(fact) for fact in facts], indent=1)


def facts_from_json(text: str) -> list[RankFacts]:
    """What `facts_to_json` wrote."""
    return [RankFacts(**fact) for fact in json.loads(text)]
