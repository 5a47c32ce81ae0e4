"""Time several implementations fairly: in turn, round after round, so that a drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from typing import Callable, Mapping

import torch

from moedist.world import return_freed_memory


SLOW_FACTOR, SLOW_ROUNDS = 4, 3


def interleaved_medians(runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2,
                        device: torch.device = torch.device("cpu"), slow_factor: float = SLOW_FACTOR) -> dict[str, float]:
    """Median of `interleaved_seconds`."""
    seconds = interleaved_seconds(runs, rounds, warmup, device, slow_factor)
    return {name: statistics.median(of) for name, of in seconds.items()}


def interleaved_seconds(runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2,
                        device: torch.device = torch.device("cpu"),
                        slow_factor: float = SLOW_FACTOR) -> dict[str, list[float]]:
    """Seconds of every function in each of `rounds` rounds; each round calls all of them once, in rotating order.

    One that is `slow_factor` times slower than the fastest is timed three times before the rounds and takes no part in
    them: it decides nothing, and would take most of the time and leave a heap of gigabytes to those after it.
    """
    def timed(name: str) -> float:
        start = time.perf_counter()
        runs[name]()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    first = {name: min(timed(name) for _ in range(2)) for name in runs}
    names = [name for name in runs if first[name] <= slow_factor * min(first.values())]
    seconds = {name: [timed(name) for _ in range(SLOW_ROUNDS)] for name in runs if name not in names}
    return_freed_memory()
    for i in range(warmup + rounds):
        shift = i % len(names)  # no one always runs after the same neighbour
        for name in names[shift:] + names[:shift]:
            value = timed(name)
            if i >= warmup:
                seconds.setdefault(name, []).append(value)
    return {name: seconds[name] for name in runs}
