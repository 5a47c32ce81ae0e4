"""The bank of experts in any form, dense ones among them: what compression leaves where it factors matrices."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import accumulate
from typing import Callable, ContextManager, Sequence

import torch
from torch import nn

from moedist.model.bank import Bank, BankTensors
from moedist.model.chains import Chain, chains_of
from moedist.model.forms import ExpertForm
from moedist.model.grouped_factors import grouped_factors


class FactoredBank(Bank):
    """Experts one after another in one flat parameter, each in the order of its form.

    Attributes:
        flat: 1-D, all numbers.
    """

    def __init__(self, layer: int, expert_ids: Sequence[int], forms: Sequence[ExpertForm], width: int, activation: str,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        super().__init__(layer, expert_ids, forms, width, activation, device)
        self._starts = [0, *accumulate(form.numbers for form in self.forms)]
        self.flat = nn.Parameter(torch.empty(self._starts[-1], device=device, dtype=dtype))
        self._chains: list[list[Chain]] = []
        self._chains_version = -1

    def forward(self, rows_RD: torch.Tensor, counts: Sequence[int],
                timed: Callable[[], ContextManager] = nullcontext) -> torch.Tensor:
        return grouped_factors(rows_RD, self.flat.to(rows_RD.dtype), self.chains(), counts, self.activation, timed)

    def blocks_of(self, expert: int, tensors: BankTensors) -> BankTensors:
        """(all numbers of the expert,), 1-D."""
        i = self.expert_ids.index(expert)
        return (tensors[0][self._starts[i]:self._starts[i + 1]],)

    def chains(self) -> list[list[Chain]]:
        """Of every expert. Made anew when the index vectors have been written, by a checkpoint or a move."""
        if self._chains_version != self.indices._version:
            self._chains = [chains_of(form, start, self.indices_of(e))
                            for e, form, start in zip(self.expert_ids, self.forms, self._starts)]
            self._chains_version = self.indices._version
        return self._chains
