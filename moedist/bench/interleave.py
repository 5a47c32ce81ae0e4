"""Time several implementations fairly: in turn, round after round, so that a drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from typing import Callable, Mapping

import torch


def interleaved_medians(runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2,
                        device: torch.device = torch.device("cpu")) -> dict[str, float]:
    """Median seconds of every function over `rounds` rounds; each round calls all of them once, in rotating order."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warmup + rounds):
        shift = i % len(names)  # no one always runs after the same neighbour
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            runs[name]()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
