"""Token ids in a .npy file that is written part by part, without knowing the length beforehand."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np

HEADER_BYTES = 128


def write_tokens(path: str | os.PathLike, dtype: np.dtype, parts: Iterable[np.ndarray]) -> int:
    """Write arrays of ids [n] one after the other, and give back how many ids that are.

    Args:
        path: the file, overwritten.
        dtype: little-endian unsigned type of the ids.
        parts: the arrays; only one is in memory at a time.
    """
    count = 0
    with open(path, "wb") as file:
        file.write(_header(dtype, 0))
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).tobytes())
            count += len(part)
        file.seek(0)
        file.write(_header(dtype, count))
    return count


def open_tokens(path: str | os.PathLike) -> np.ndarray:
    """Map a token file read-only: ids [tokens].

    Raises:
        OSError, ValueError: the file is missing or damaged.
    """
    return np.load(path, mmap_mode="r")


def _header(dtype: np.dtype, count: int) -> bytes:
    """Version 1.0 of the .npy format, padded so that its length does not depend on the count."""
    fields = f"{{'descr': '{np.dtype(dtype).str}', 'fortran_order': False, 'shape': ({count},), }}"
    text = fields.ljust(HEADER_BYTES - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1")
