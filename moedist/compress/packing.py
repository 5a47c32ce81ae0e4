"""Integers of 2, 3, 4 or 8 bits in real bytes, row by row.

A row of C codes is cut into planes, one after another: 3 bits are a plane of the low 2 and a plane of the high 1. In a plane
of w bits, 8 / w codes share a byte, the first in its lowest bits, so that packing is a few shifts of bytes for all widths, and
unpacking a look-up. A plane is ceil(C w / 8) bytes; rows begin on a byte.
"""

from __future__ import annotations

import functools

import torch

from moedist.errors import CompressError

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # bits -> widths of the planes, low bits first


def check_bits(bits: int) -> None:
    """Raise CompressError for a width that there is no packing for."""
    if bits not in PLANES:
        raise CompressError(f"{bits} bits cannot be packed: choose {', '.join(map(str, PLANES))}")


def packed_width(columns: int, bits: int) -> int:
    """Bytes of a row of so many codes.

    >>> packed_width(64, 3), packed_width(9, 3)
    (24, 5)
    """
    check_bits(bits)
    return sum(-(-columns * width // 8) for width in PLANES[bits])


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [R, packed_width(C, bits)] of codes [R, C], integers from 0 to 2^bits - 1.

    Raises:
        CompressError: other bits than 2, 3, 4 or 8, or codes that do not fit.
    """
    check_bits(bits)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise CompressError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit {bits} bits, 0 to {2**bits - 1}")
    planes, shift, codes = [], 0, codes.to(torch.uint8)
    for width in PLANES[bits]:
        planes.append(_pack_plane((codes >> shift) & (2**width - 1), width))
        shift += width
    return torch.cat(planes, dim=1) if len(planes) > 1 else planes[0]


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """uint8 [R, C], the inverse of `pack`.

    Raises:
        CompressError: rows of another length than C codes take.
    """
    if packed.shape[1] != packed_width(columns, bits):
        raise CompressError(f"rows of {packed.shape[1]} bytes do not hold {columns} codes of {bits} bits, which take "
                            f"{packed_width(columns, bits)}")
    codes, start, shift = None, 0, 0
    for width in PLANES[bits]:
        stop = start + -(-columns * width // 8)
        plane = _unpack_plane(packed[:, start:stop], width, shift, columns)
        codes = plane if codes is None else codes | plane
        start, shift = stop, shift + width
    return codes


def _pack_plane(values: torch.Tensor, width: int) -> torch.Tensor:
    in_byte = 8 // width
    if in_byte == 1:
        return values.clone()
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % in_byte)).unflatten(1, (-1, in_byte))
    packed = values[:, :, 0].clone()
    for i in range(1, in_byte):
        packed |= values[:, :, i] << (i * width)
    return packed


def _unpack_plane(packed: torch.Tensor, width: int, shift: int, columns: int) -> torch.Tensor:
    """The codes of a plane, moved up by `shift` bits."""
    if width == 8:
        return packed
    words = _table(width, shift, packed.device).index_select(0, packed.flatten().int())
    return words.view(torch.uint8).view(len(packed), packed.shape[1] * (8 // width))[:, :columns]


@functools.lru_cache(maxsize=None)
def _table(width: int, shift: int, device: torch.device) -> torch.Tensor:
    """[256]: for every byte its codes, a byte each, in one word: a look-up instead of shifts, a third of the time."""
    every = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    codes = ((every >> torch.arange(0, 8, width, dtype=torch.uint8)) & (2**width - 1)) << shift
    return codes.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[8 // width]).squeeze(1).to(device)
