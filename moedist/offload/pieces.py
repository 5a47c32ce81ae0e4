"""What is fetched at once: the weights of an expert as a run of bytes, and its compensators as another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Iterable, Mapping, NamedTuple

import torch

from moedist.errors import CompressError
from moedist.model import Bank

ALIGNMENT = 16  # bytes that every tensor begins at a multiple of
FACTORS = ("left", "right")


class PieceId(NamedTuple):
    """Of which expert, and whether its compensators (or else its weights)."""

    layer: int
    expert: int
    compensators: bool


@dataclass(frozen=True)
class Piece:
    """How the bytes of a piece are tensors: name -> (dtype, shape), each at the next aligned place."""

    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> "Piece":
        return cls(tuple((name, t.dtype, tuple(t.shape)) for name, t in tensors.items()))

    @property
    def bytes(self) -> int:
        """Gaps included."""
        return sum(_aligned(math.prod(shape) * dtype.itemsize) for _, dtype, shape in self.tensors)

    def join(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """uint8 [bytes] on the CPU."""
        flat = torch.zeros(self.bytes, dtype=torch.uint8)
        for name, view in self.views(flat).items():
            view.copy_(tensors[name])
        return flat

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors by name, as views of their bytes."""
        found, start = {}, 0
        for name, dtype, shape in self.tensors:
            stop = start + math.prod(shape) * dtype.itemsize
            found[name] = flat[start:stop].view(dtype).view(shape)
            start += _aligned(stop - start)
        return found


def pieces_of(bank: Bank, dtype: torch.dtype) -> Iterable[tuple[PieceId, dict[str, torch.Tensor]]]:
    """The pieces of all experts of a bank, without those that hold nothing.

    Args:
        dtype: of dense experts' weights, that of the rows they will meet.

    Raises:
        CompressError: a factored expert.
    """
    for e in bank.expert_ids:
        form, tensors = bank.form_of(e), bank.split(e, bank.weights())
        if not form.is_lowbit:
            if not form.is_dense:
                raise CompressError(f"expert {e} of layer {bank.layer} is factored; experts outside the device are dense or "
                                    "in few bits: moedist compress RUN --dense, then --method beam")
            w_in, w_out = bank.blocks_of(e, bank.weights())
            yield PieceId(bank.layer, e, False), {"w_in": w_in.to(dtype), "w_out": w_out.to(dtype)}
            continue
        for compensators in (False, True):
            mine = {name: t for name, t in tensors.items() if name.partition(".")[2].startswith(FACTORS) == compensators}
            if mine:
                yield PieceId(bank.layer, e, compensators), mine


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
