"""Seeded initial weights that depend on a parameter's global name alone: the same for any placement and world."""

from __future__ import annotations

import hashlib

import torch


@torch.no_grad()
def fill_normal(tensor: torch.Tensor, std: float, seed: int, name: str) -> None:
    """Fill with normal numbers drawn on the CPU in float32 from (seed, name), then cast: equal on every device."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    tensor.copy_(torch.empty(tensor.shape, dtype=torch.float32).normal_(0, std, generator=generator))
