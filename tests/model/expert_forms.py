"""Experts in every form, for tests of banks and of what handles them."""

from __future__ import annotations

from typing import Optional

import torch

from moedist.compress import ColumnsRows, Compressed, Dense, Interpolated, LowBit, Matrix, TwoFactors
from moedist.compress.compensate import compensate, factor_scheme
from moedist.compress.quantise import Scheme, round_to_nearest
from moedist.compress.weighting import Weighting
from moedist.model import Bank
from moedist.model.forms import ExpertForm, indices_of, tensors_of

KINDS = ("dense", "two", "interp", "cur")
BITS = (2, 3, 4, 8)


def matrix_of(kind: str, hidden: int, width: int, rank: int, generator: torch.Generator) -> Matrix:
    """A random matrix [hidden, width] of this kind, float64."""
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    def some(count: int, of: int) -> torch.Tensor:
        return torch.randperm(of, generator=generator)[:count].int()

    rank = min(rank, hidden, width)
    if kind == "dense":
        return Dense(normal(hidden, width))
    if kind == "two":
        return TwoFactors(normal(hidden, rank), normal(rank, width))
    if kind == "interp":  # kept in any order, as far as the form is concerned
        return Interpolated(some(rank, hidden), normal(hidden - rank, rank), normal(rank, width))
    return ColumnsRows(some(rank, width), some(rank, hidden), normal(hidden, rank), normal(rank, rank), normal(rank, width))


def expert_of(kinds: str, hidden: int, width: int, rank: int = 2, gated: bool = True, seed: int = 0,
              before: Optional[int] = None) -> Compressed:
    """An expert whose gate, up and down are of `kinds`, e.g. "interp dense two"; one kind stands for all.

    Args:
        before: neurons before compression; None: all were kept.
    """
    generator = torch.Generator().manual_seed(seed)
    if kinds.startswith("low"):
        return low_expert(int(kinds[3:] or BITS[seed % 4]), hidden, width, rank, gated, generator, before)
    names = kinds.split() if " " in kinds else [kinds] * 3
    parts = {part: matrix_of(kind, hidden, width, rank, generator)
             for part, kind in zip(("gate", "up", "down"), names) if gated or part != "gate"}
    neurons = None if before is None else torch.randperm(before, generator=generator)[:hidden].sort().values.int()
    return Compressed(before or hidden, neurons, parts)


def low_expert(bits: int, hidden: int, width: int, rank: int, gated: bool, generator: torch.Generator,
               before: Optional[int] = None) -> Compressed:
    """An expert in few bits, with compensators of `rank` (0: without)."""
    parts = {}
    for part in ("gate", "up", "down")[not gated:]:
        weight = torch.randn(hidden, width, generator=generator, dtype=torch.float64) / width**0.5
        transposed, scheme = part == "down", Scheme(bits, 4, symmetric=bits == 4, ragged=True)
        found = LowBit(round_to_nearest(weight.t() if transposed else weight, scheme), transposed)
        if rank:
            residual, most = weight - found.dense(torch.float64), min(rank, hidden, width)
            compensator = compensate(residual, most, Weighting(None, None, 1.0), factor_scheme(8, 4))
            found = LowBit(found.weight, transposed, compensator)
        parts[part] = found
    return Compressed(before or hidden, None if before is None else torch.arange(hidden).int(), parts)


@torch.no_grad()
def fill(bank: Bank, experts: dict[int, Compressed]) -> None:
    """Write experts into a bank of their forms."""
    for e in bank.expert_ids:
        for name, view in bank.split(e, bank.weights()).items():
            view.copy_(tensors_of(experts[e])[name])
        for name, view in bank.form_of(e).split_indices(bank.indices_of(e)).items():
            view.copy_(indices_of(experts[e])[name])


def forms_of(experts: dict[int, Compressed]) -> dict[int, ExpertForm]:
    return {e: ExpertForm.of(compressed) for e, compressed in experts.items()}
