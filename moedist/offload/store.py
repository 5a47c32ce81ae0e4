"""Where experts are when they are not on the device: host memory, or a file that is mapped into it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Mapping, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moedist.offload.pieces import PieceId


class Store(Protocol):
    """Pieces by id."""

    def read(self, piece: PieceId, out: torch.Tensor) -> None:
        """Copy its bytes into `out`, on the device."""


class RamStore(Store):
    """Host memory, pinned where an accelerator can copy from it without waiting."""

    def __init__(self, pieces: Mapping[PieceId, torch.Tensor], device: torch.device, limit: float | None = None):
        self._pieces = {key: flat.pin_memory() if device.type == "cuda" else flat for key, flat in pieces.items()}
        self._limit = Limit(limit)

    def read(self, piece: PieceId, out: torch.Tensor) -> None:
        with self._limit.reading(len(out)):
            out.copy_(self._pieces[piece])


class DiskStore(Store):
    """A safetensors file, written once and mapped; what is read of it is in host memory only meanwhile."""

    def __init__(self, path: Path, pieces: Mapping[PieceId, torch.Tensor], limit: float | None = None):
        save_file({_name(key): flat for key, flat in pieces.items()}, path)
        self._file = safe_open(path, framework="pt", device="cpu")
        self._limit = Limit(limit)

    def read(self, piece: PieceId, out: torch.Tensor) -> None:
        with self._limit.reading(len(out)):
            out.copy_(self._file.get_tensor(_name(piece)))


class Limit:
    """No more bytes a second than declared: what a slower disk or link would give, whatever is in the page cache."""

    def __init__(self, bytes_per_s: float | None):
        self.bytes_per_s = bytes_per_s

    def reading(self, size: int) -> "_Reading":
        """Around a read of so many bytes."""
        return _Reading(size / self.bytes_per_s if self.bytes_per_s else 0.0)


class _Reading:
    def __init__(self, seconds: float):
        self._seconds = seconds

    def __enter__(self) -> None:
        self._end = time.perf_counter() + self._seconds

    def __exit__(self, *_) -> None:
        if (left := self._end - time.perf_counter()) > 0:
            time.sleep(left)


def _name(piece: PieceId) -> str:
    return f"layers.{piece.layer}.experts.{piece.expert}.{'compensators' if piece.compensators else 'weights'}"
