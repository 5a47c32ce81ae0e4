"""The bank of experts in few bits, as `moedist.compress.beam` leaves them: forward alone, for evaluation and generation."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Callable, ContextManager, Iterator, Optional, Sequence

import torch
from torch import nn

from moedist.compress import LowBit
from moedist.errors import CompressError
from moedist.model.bank import Bank, BankTensors
from moedist.model.forms import ExpertForm, dtype_of
from moedist.model.lowbit_ffn import lowbit_ffn
from moedist.model.threads import in_threads

ALIGNMENT = 16  # bytes that every tensor begins at a multiple of


@dataclass(frozen=True)
class Place:
    """Where a tensor is among the bytes of its expert."""

    name: str
    where: slice
    shape: tuple[int, ...]

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor, as a view of the expert's bytes."""
        return flat[self.where].view(dtype_of(self.name)).view(self.shape)


def places_of(form: ExpertForm) -> tuple[list[Place], int]:
    """Where the tensors of an expert are, and the bytes of all, gaps included."""
    found, start = [], 0
    for name, shape in form.tensors:
        stop = start + math.prod(shape) * dtype_of(name).itemsize
        found.append(Place(name, slice(start, stop), shape))
        start = -(-stop // ALIGNMENT) * ALIGNMENT
    return found, start


@dataclass(frozen=True)
class Job:
    """An expert with rows; `restored` are those of its rows that compensators are for (None: all)."""

    expert: int
    rows: slice
    restored: Optional[torch.Tensor]
    size: int


class LowBitBank(Bank):
    """Experts one after another in one flat run of bytes, each in the order of its form.

    Attributes:
        flat: uint8, all tensors. Not trained.
    """

    restores = True

    def __init__(self, layer: int, expert_ids: Sequence[int], forms: Sequence[ExpertForm], width: int, activation: str,
                 device: torch.device | str = "cpu"):
        super().__init__(layer, expert_ids, forms, width, activation, device)
        self._places = [places_of(form) for form in self.forms]
        self._starts = [0, *accumulate(size for _, size in self._places)]
        self.flat = nn.Parameter(torch.zeros(self._starts[-1], dtype=torch.uint8, device=device), requires_grad=False)
        self._parts: dict[int, dict[str, LowBit]] = {}

    def forward(self, rows_RD: torch.Tensor, counts: Sequence[int], timed: Callable[[], ContextManager] = nullcontext,
                restored_R: Optional[torch.Tensor] = None) -> torch.Tensor:
        """See `Bank.forward`.

        Args:
            restored_R: bool, the rows that compensators are for; None: all.

        Raises:
            CompressError: a gradient is wanted.
        """
        if torch.is_grad_enabled() and rows_RD.requires_grad:
            raise CompressError("experts in few bits have no backward pass: train, watch or compress the run that they were "
                             "made of, and evaluate and generate with this one")
        out = torch.empty_like(rows_RD)

        def run(queue: Iterator[Job]) -> None:
            for job in queue:
                out[job.rows] = lowbit_ffn(rows_RD[job.rows], self.parts_of(job.expert), self.activation, job.restored)

        with timed():
            in_threads(run, self.jobs(counts, restored_R), rows_RD.device)
        return out

    def jobs(self, counts: Sequence[int], restored_R: Optional[torch.Tensor]) -> list[Job]:
        """One for each expert that has rows."""
        found, start = [], 0
        for e, form, count in zip(self.expert_ids, self.forms, counts):
            if count:
                rows = slice(start, start + count)
                which = None
                if restored_R is not None and not restored_R[rows].all():
                    which = restored_R[rows].nonzero().squeeze(1)
                found.append(Job(e, rows, which, form.numbers * (count + 1)))  # unpacking is about a row's worth
            start += count
        return found

    def parts_of(self, expert: int) -> dict[str, LowBit]:
        """The matrices of one expert, by part: views of the bytes as they are now and will be."""
        if expert not in self._parts:
            self._parts[expert] = dict(self.stored(expert).parts)
        return self._parts[expert]

    def blocks_of(self, expert: int, tensors: BankTensors) -> BankTensors:
        """(all bytes of the expert,), 1-D."""
        i = self.expert_ids.index(expert)
        return (tensors[0][self._starts[i]:self._starts[i + 1]],)

    def split(self, expert: int, tensors: BankTensors) -> dict[str, torch.Tensor]:
        (flat,), (places, _) = self.blocks_of(expert, tensors), self._places[self.expert_ids.index(expert)]
        return {place.name: place.of(flat) for place in places}

    def initialise(self, seed: int, std: float, out_std: float) -> None:
        """Nothing: what is in few bits comes from a checkpoint or a compression."""
