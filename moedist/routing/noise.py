"""Random numbers that are a pure function of (key, seed), so that they do not depend on who draws them.

SplitMix64 (Steele, Lea, Flood 2014, doi 10.1145/2714064.2660195) in wrapping int64 arithmetic.
"""

from __future__ import annotations

import math

import torch

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def mix_seeds(*values: int) -> int:
    """One 63-bit seed out of several whole numbers, order mattering."""
    z = 0
    for value in values:
        z = (z ^ (value & _MASK)) + _GAMMA & _MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
        z ^= z >> 31
    return z >> 1


def hash_int(keys: torch.Tensor, seed: int) -> torch.Tensor:
    """int64 hash of every key, uniform over [0, 2^63)."""
    def shift(v: torch.Tensor, bits: int) -> torch.Tensor:  # logical, int64 shifts are arithmetic
        return (v >> bits) & ((1 << 64 - bits) - 1)

    z = keys * _signed(_GAMMA) + _signed(mix_seeds(seed) * 2 + 1)
    z = (z ^ shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ shift(z, 27)) * _signed(0x94D049BB133111EB)
    return shift(z ^ shift(z, 31), 1)


def uniform(keys: torch.Tensor, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Uniform numbers in (0, 1), shape keys.shape + (columns,)."""
    column_seeds = torch.arange(columns, device=keys.device, dtype=torch.int64)
    bits = hash_int(hash_int(keys, seed).unsqueeze(-1) + column_seeds, seed) >> 39  # 24 bits: exact in float32
    # float32 would round the largest up to 1, of which `normal` makes infinity: one draw in 30 million
    return ((bits.to(dtype) + 0.5) / (1 << 24)).clamp_(max=1 - 2**-24)


def normal(keys: torch.Tensor, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers, shape keys.shape + (columns,), by inverting the distribution function."""
    return torch.erfinv(2 * uniform(keys, columns, seed, dtype) - 1) * math.sqrt(2)
