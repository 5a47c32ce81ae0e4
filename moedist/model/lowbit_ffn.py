"""One expert in few bits applied to its rows: weights become numbers a block at a time, and are gone after the product.

n rows of one expert, D model width, J hidden neurons, r rank of a compensator.
"""

from __future__ import annotations

from typing import Mapping, Optional

import torch

from moedist.compress import LowBit
from moedist.compress.quantise import Quantised
from moedist.model.activations import activate

BLOCK_VALUES = 2**16  # weights that are numbers at a time: a quarter of a megabyte in float32


def product(x: torch.Tensor, weight: Quantised) -> torch.Tensor:
    """x [n, C] times Q^T: [n, R], for Q [R, C]."""
    rows, columns = weight.shape
    out, step = x.new_empty(len(x), rows), max(1, BLOCK_VALUES // max(1, columns))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32  # a grid's arithmetic, whatever the rows are in
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        block = weight.rows(part, wide).to(x.dtype).t()
        if step >= rows:
            return x @ block
        torch.mm(x, block, out=out[:, part])
    return out


def lowbit_ffn(x: torch.Tensor, parts: Mapping[str, LowBit], activation: str,
               restored: Optional[torch.Tensor]) -> torch.Tensor:
    """[n, D]: rows through their expert.

    Args:
        parts: gate (swiglu), up and down. Compensators are looked at only where a row is restored.
        restored: int64 indices of the rows that compensators are for; None: of all.
    """
    h = [_restore(product(x, parts[part].weight), x, parts[part], restored) for part in ("gate", "up") if part in parts]
    a = torch.empty_like(h[0])
    activate(h, a, activation)
    return _restore(product(a, parts["down"].weight), a, parts["down"], restored)


def _restore(y: torch.Tensor, x: torch.Tensor, matrix: LowBit, restored: Optional[torch.Tensor]) -> torch.Tensor:
    """Add to y what the compensator makes of some rows of x, in place."""
    if matrix.compensator is None or restored is not None and not len(restored):
        return y
    factors = matrix.compensator.left, matrix.compensator.right
    inner, outer = factors if matrix.transposed else reversed(factors)  # down takes neurons in
    rows = x if restored is None else x.index_select(0, restored)
    found = product(rows, inner) @ _numbers(outer, x.dtype)
    return y.add_(found) if restored is None else y.index_add_(0, restored, found)


def _numbers(factor: Quantised, dtype: torch.dtype) -> torch.Tensor:
    return factor.dense(torch.float64 if dtype == torch.float64 else torch.float32).to(dtype)
