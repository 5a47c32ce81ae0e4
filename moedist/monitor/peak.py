"""The FLOP/s that a rank reaches in a matrix product: what its model FLOP/s are measured against."""

from __future__ import annotations

import time

import torch

LEAST_S, LARGEST, ROUNDS = 2e-3, 8192, 5


@torch.no_grad()
def measured_peak(device: torch.device, dtype: torch.dtype, slowdown: float = 1.0) -> float:
    """FLOP/s of a square matrix product, the best of some rounds; tens of milliseconds.

    Sizes double until one product takes `LEAST_S`, so that neither a slow CPU nor a fast accelerator is measured on its
    overheads. Peaks are measured, not read from data sheets: ranks differ, and share their cores.

    Args:
        slowdown: declared for this rank (`world.slowdown`): its peak is that much lower.
    """
    size = 256
    while True:
        a = torch.ones(size, size, device=device, dtype=dtype)
        _product_s(a)  # the first one plans and allocates
        best = _product_s(a)
        if best >= LEAST_S or size >= LARGEST:
            break
        size *= 2
    best = min([best, *(_product_s(a) for _ in range(ROUNDS))])
    return 2 * size**3 / best / slowdown


def _product_s(a: torch.Tensor) -> float:
    if a.device.type != "cpu":
        torch.accelerator.synchronize(a.device)
    start = time.perf_counter()
    a @ a
    if a.device.type != "cpu":
        torch.accelerator.synchronize(a.device)
    return time.perf_counter() - start
