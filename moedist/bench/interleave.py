"""Time several implementations fairly: in turn, round after round, so that a drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from typing import Callable, Mapping

import torch


SLOW_FACTOR, SLOW_ROUNDS = 10, 3


def interleaved_medians(runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2,
                        device: torch.device = torch.device("cpu")) -> dict[str, float]:
    """Median seconds of every function over `rounds` rounds; each round calls all of them once, in rotating order.

    One that is 10 times slower than the fastest takes part in the first 3 rounds only: it decides nothing, and would take
    most of the time and all of the cache.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warmup + rounds):
        if i == warmup + SLOW_ROUNDS:
            fastest = min(statistics.median(seconds[name]) for name in names)
            names = [name for name in names if statistics.median(seconds[name]) <= SLOW_FACTOR * fastest]
        shift = i % len(names)  # no one always runs after the same neighbour
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            runs[name]()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
