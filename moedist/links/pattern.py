"""Known bytes: other ones for every two ranks and dtype, cheap to make and to compare, every place told from the next."""

from __future__ import annotations

import torch

# what travels: rows and gradients in a training's dtypes, packed parcels (uint8), int8 rows, counts and codes
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64, torch.uint8)
WORD = 8  # bytes
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio, odd: its multiples differ in all bits


def pattern(source: int, target: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """`nbytes`, a multiple of 8, that `source` sends to `target`, as a 1-D CPU tensor of `dtype`; some are no numbers."""
    assert nbytes % WORD == 0, "whole words"
    first = 1 + (source << 40) + (target << 20) + DTYPES.index(dtype)
    return ((torch.arange(nbytes // WORD, dtype=torch.int64) + first) * GOLDEN).view(dtype)


def wrong_bytes(arrived: torch.Tensor, wanted: torch.Tensor) -> tuple[int, int]:
    """(how many bytes differ, the place of the first that does), bit by bit: (0, 0) where none does."""
    differ = arrived.cpu().view(torch.uint8) != wanted.view(torch.uint8)
    count = int(differ.sum())
    return count, int(differ.to(torch.uint8).argmax()) if count else 0
