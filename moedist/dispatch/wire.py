"""Rows as bytes: what they are turned into for a link, and several tensors in one exchange.

U rows of width D, N pairs of a row and an expert.
"""

from __future__ import annotations

from itertools import chain
from typing import Optional, Sequence

import torch

SCALE_BYTES = 4


def row_bytes(width: int, dtype: torch.dtype, wire_dtype: Optional[torch.dtype] = None) -> int:
    """Bytes of a row of `dtype` that travels as `wire_dtype` (None: as it is)."""
    if wire_dtype is None:
        return width * dtype.itemsize
    return width * wire_dtype.itemsize + (SCALE_BYTES if wire_dtype == torch.int8 else 0)


def encode_rows(rows_UD: torch.Tensor, wire_dtype: Optional[torch.dtype] = None) -> torch.Tensor:
    """uint8 [U, row bytes]: as they are, rounded to bfloat16, or as int8 with the row's largest absolute value over 127
    (float32) before them. The error of a value is at most 2^-8 of it in bfloat16, and 1/254 of the row's largest in int8."""
    if wire_dtype is None:
        return as_bytes(rows_UD)
    if wire_dtype != torch.int8:
        return as_bytes(rows_UD.to(wire_dtype))
    scale_U1 = rows_UD.abs().amax(1, keepdim=True).float() / 127
    # rows of zeros stay zeros, and what is not finite stays so by its scale
    values_UD = (rows_UD / scale_U1.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([as_bytes(scale_U1), as_bytes(values_UD)], dim=1)


def decode_rows(bytes_U: torch.Tensor, dtype: torch.dtype, wire_dtype: Optional[torch.dtype] = None) -> torch.Tensor:
    """[U, D] from what `encode_rows` made; exact rows are a view."""
    if wire_dtype != torch.int8:
        return bytes_U.view(wire_dtype or dtype).to(dtype)
    scale_U1 = bytes_U[:, :SCALE_BYTES].flatten().view(torch.float32).unsqueeze(1)
    return (bytes_U[:, SCALE_BYTES:].view(torch.int8) * scale_U1).to(dtype)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A view (of a contiguous copy where it is none) as uint8, the last dimension longer."""
    if not tensor.is_contiguous() or tensor.stride(-1) != 1:  # a dimension of one entry may have any stride
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.view(torch.uint8)


def pack(columns: Sequence[torch.Tensor], lengths: Sequence[Sequence[int]]) -> torch.Tensor:
    """One buffer for all ranks: for each of them its part of every column.

    Args:
        columns: each a uint8 tensor whose first dimension holds the parts of all ranks, one after another.
        lengths: of each column, its parts' lengths in the first dimension.
    """
    if len(columns) == 1:
        return columns[0].reshape(-1)
    parts = [column.split(list(of_column)) for column, of_column in zip(columns, lengths)]
    return torch.cat([part.reshape(-1) for part in chain.from_iterable(zip(*parts))])


def unpack(buffer: torch.Tensor, lengths: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[torch.Tensor]:
    """The columns [.., size] of `pack`, in storage that any dtype can be viewed in; `sizes` are bytes of an entry."""
    if len(sizes) == 1:
        return [buffer.view(-1, sizes[0])]
    spans = [[n * size for n in of_column] for of_column, size in zip(lengths, sizes)]
    parts = buffer.split(list(chain.from_iterable(zip(*spans))))
    return [torch.cat(parts[i::len(sizes)]).view(-1, size) for i, size in enumerate(sizes)]


def packed_bytes(lengths: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[int]:
    """Bytes of every rank's part of the buffer."""
    return [sum(n * size for n, size in zip(of_rank, sizes)) for of_rank in zip(*lengths)]
