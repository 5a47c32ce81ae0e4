"""Experts that live outside the device: a store of all, a cache of some, read ahead of need. For evaluation and generation.

`offload` takes a model's experts out of it. `pieces` says what is fetched at once, `store` where from, `cache` what stays,
`ahead` what comes next, and `bank` computes with what the cache hands it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Callable

import torch

from moedist.config import OffloadConfig
from moedist.model import Transformer
from moedist.offload.ahead import read_ahead
from moedist.offload.bank import OffloadedBank
from moedist.offload.cache import Cache, Moved
from moedist.offload.pieces import Piece, PieceId, pieces_of
from moedist.offload.store import DiskStore, RamStore


class Offloaded:
    """A model whose experts are outside it, until `close`."""

    def __init__(self, cache: Cache, bytes_outside: int, ends: list[Callable[[], None]]):
        self.cache, self.bytes_outside, self._ends = cache, bytes_outside, ends

    @property
    def moved(self) -> Moved:
        """What the cache has done so far."""
        return self.cache.moved

    def close(self) -> None:
        """End reading ahead, and remove what is on disk."""
        self.cache.close()
        for end in self._ends:
            end()

    def describe(self) -> str:
        """One line for people."""
        m = self.moved
        return (f"{self.bytes_outside / 2**20:.2f} MiB of experts outside the device, {m.peak / 2**20:.2f} MiB of "
                f"{self.cache.limit / 2**20:.2f} held at most; {m.bytes / 2**20:.2f} MiB moved ({m.ahead_bytes / 2**20:.2f} "
                f"ahead), {100 * m.hit_rate:.1f} % hits, {m.stall_s:.2f} s stalled")


def offload(model: Transformer, config: OffloadConfig, dtype: torch.dtype, folder: Path | None = None) -> Offloaded:
    """Move a model's experts of this rank to a store; its layers fetch them from there.

    They pass through the device's memory once, layer by layer, as the model has been loaded.

    Args:
        dtype: of the rows that experts will meet; dense experts are stored in it.
        folder: for a file of this rank (None: the system's folder for temporary files).

    Raises:
        CompressError: a factored expert; a cache that does not hold one expert.
    """
    layouts: dict[PieceId, Piece] = {}
    flats: dict[PieceId, torch.Tensor] = {}
    for bank in model.banks.values():
        for key, tensors in pieces_of(bank, dtype):
            layouts[key] = Piece.of(tensors)
            flats[key] = layouts[key].join(tensors)
    sizes = {key: piece.bytes for key, piece in layouts.items()}
    device, ends = next(model.parameters()).device, []
    limit = None if config.read_gib_s is None else config.read_gib_s * 2**30
    if config.store == "disk":
        file = tempfile.NamedTemporaryFile(dir=folder, prefix="experts-", suffix=".safetensors")
        store, ends = DiskStore(Path(file.name), flats, limit), [file.close]
    else:
        store = RamStore(flats, device, limit)
    cache = Cache(store, sizes, int(config.cache_gib * 2**30), device, config.policy)
    for layer, moe in model.moe_layers():
        bank = OffloadedBank(moe.bank, layouts, cache)
        moe.place(bank, moe.dispatcher)
        model.banks[layer] = bank
    ends += read_ahead(model, cache, config.prefetch)
    return Offloaded(cache, sum(sizes.values()), ends)


__all__ = ["Cache", "DiskStore", "Moved", "Offloaded", "OffloadedBank", "PieceId", "RamStore", "offload"]
