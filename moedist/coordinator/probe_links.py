"""How fast rows travel: between ranks, as dispatch sends them, and between a device and its host."""

from __future__ import annotations

import statistics
import time
from typing import Callable

import torch

from moedist.coordinator.probe_work import synchronize
from moedist.dispatch import Transport
from moedist.world import World

EXCHANGE_BYTES = 4 * 2**20  # that a rank sends in one exchange, over all others
COPY_BYTES = 16 * 2**20
TINY_ROUNDS, LARGE_ROUNDS, COPY_ROUNDS = 15, 5, 5


def measure_exchange(world: World, transport: Transport, width: int, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes per second that this rank sends, seconds of an exchange of next to nothing); zeros in a world of one.

    Collective: every rank sends as many rows of `width` values to every other.
    """
    if world.size == 1:
        return 0.0, 0.0

    def exchange(rows: int, rounds: int) -> float:
        counts = [0 if r == world.rank else rows for r in range(world.size)]
        sent = torch.zeros(sum(counts), width, device=world.device, dtype=dtype)
        received = torch.empty_like(sent)

        def once() -> None:
            transport.exchange(sent, counts, counts, out=received)
            synchronize(world.device)

        return _median_seconds(once, rounds, world.barrier)

    row_bytes = width * dtype.itemsize
    rows = max(2, EXCHANGE_BYTES // (row_bytes * (world.size - 1)))
    latency = exchange(1, TINY_ROUNDS)
    large = exchange(rows, LARGE_ROUNDS)
    # an exchange that noise made faster than that of one row still took its time
    return (world.size - 1) * rows * row_bytes / max(large - latency, large / 10), latency


def measure_host_copy(device: torch.device) -> float:
    """Bytes per second between device and host, there and back, as rows go that travel through host memory; 0 on a CPU."""
    if device.type == "cpu":
        return 0.0
    there = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)

    def once() -> None:
        there.copy_(there.cpu())
        synchronize(device)

    return 2 * COPY_BYTES / _median_seconds(once, COPY_ROUNDS, lambda: synchronize(device))


def _median_seconds(once: Callable[[], None], rounds: int, before: Callable[[], None]) -> float:
    seconds = []
    for _ in range(rounds + 1):
        before()
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])  # the first warms up
